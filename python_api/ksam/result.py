"""What a step gives back."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class StepResult(NamedTuple):
    """What a step computed, as device tensors: reading one waits for the device, the step does not.

    Attributes:
        loss: mean of ``losses``, a scalar.
        losses: of the whole batch, ``[B]``, at the weights before the update. They are at the
            perturbed weights if the step's only pass over the batch is there (MSAM,
            RandomSubsetSAM), and of the selected samples alone if no pass is over the batch (AUSAM,
            StaleKSAM between refreshes).
        indices: the samples that the ascent gradient was taken on (those of the descent gradient if
            there is no ascent gradient, or it was taken on all), int64, ascending.
        grad_norm: norm of the ascent direction, float32 scalar; 0, inf or NaN mean that the descent
            gradient was taken at the unperturbed weights.
        aux: the second value that the loss function returned in the pass of ``losses``, if it
            returns two; else None. It may be any tree that a batch may be: tensors in it (also
            those without dimensions) are detached, other leaves are as the function returned them.
            With ``micro_batch_size`` it is a list of such values, one for every micro-batch.
        sharp: whether it was a sharpness-aware step of the method (True) or one of those that
            ``when`` leaves to the base optimizer, plain or along its momentum (False).
        share: the share of the batch's gradient bounds that the selection carries, if the step
            computed it (see :class:`ksam.Representative`); else None.
    """

    loss: Tensor
    losses: Tensor
    indices: Tensor
    grad_norm: Tensor
    aux: Any
    sharp: bool
    share: Tensor | None
