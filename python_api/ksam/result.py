"""What a step gives back."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class StepResult(NamedTuple):
    """What a step computed, as device tensors: reading one waits for the device, the step does not.

    Attributes:
        loss: mean of ``losses``, a scalar.
        losses: of the whole batch, ``[B]``, at the weights before the update; at the perturbed
            ones where the step's only pass over the batch is there (MSAM, RandomSubsetSAM); of the
            selected samples alone where none is over the batch (AUSAM, StaleKSAM between
            refreshes).
        indices: the samples that the ascent gradient was taken on (the descent's, where there is
            none or it was taken on all), int64, ascending.
        grad_norm: norm of the ascent direction, float32 scalar; 0, inf or NaN mean that the descent
            gradient was taken at the unperturbed weights.
        aux: the second value of the loss function in the pass of ``losses``, if it returns two;
            else None. Its tensors are detached, in any tree that a batch may be (one without
            dimensions, too), and what is no tensor is what the function returned. With
            ``micro_batch_size`` a list of them, one for every micro-batch.
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
