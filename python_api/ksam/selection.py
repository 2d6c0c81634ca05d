"""How many samples a step selects, and what a whole batch's loss records for selecting them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

import ksam_kernels
from ksam.parts import Part
from ksam_kernels.library import is_transformed

K = float | int
Schedule = Callable[[int], float | int]


def check_k(k: object, name: str = "k") -> K:
    """A fraction in (0, 1] (float) or a count >= 1 (int)."""
    if isinstance(k, bool) or not isinstance(k, Real):
        raise TypeError(f"{name} must be a float in (0, 1] or an int >= 1, got {k!r}")
    if isinstance(k, Integral):
        if k < 1:
            raise ValueError(f"{name} as a count must be >= 1, got {k!r}")
        return int(k)
    if not 0.0 < float(k) <= 1.0:
        raise ValueError(f"{name} as a fraction must be in (0, 1], got {k!r}")
    return float(k)


def subset_size(k: K, batch_size: int) -> int:
    """Samples selected from a batch: max(1, round(k B)) for a fraction, min(k, B) for a count."""
    if isinstance(k, float):
        return max(1, round(k * batch_size))
    return min(k, batch_size)


class Amount(Part):
    """A number of samples: a fraction of the batch, a count, or a function of the step."""

    def __init__(self, value: K | Schedule, name: str = "k") -> None:
        self.name = name
        self.value = value if callable(value) else check_k(value, name)

    def of(self, samples: int, step: int) -> int:
        """How many that is of a batch of ``samples``, at a step."""
        value = self.value(step) if callable(self.value) else self.value
        return subset_size(check_k(value, self.name), samples)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, if it has some (:class:`ksam.AccuracySchedule`); else empty."""
        return self.value.state_dict() if isinstance(self.value, Part) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.value, Part) and state:
            self.value.load_state_dict(state)


@contextmanager
def _versioned() -> Iterator[None]:
    """Tensors made within count the writes to them, unlike those of inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _differentiable(value: Any) -> Any:
    """The value; of a tensor made in inference mode, which autograd does not take, a copy."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


class Recording:
    """The fused loss of a whole batch, if the loss function made one: its top k and its logits."""

    def __init__(self, batch_size: int, k: int | None) -> None:
        self.batch_size = batch_size
        self._k = k
        self._losses: Tensor | None = None
        self._version = 0
        self._indices: Tensor | None = None
        self._inputs: tuple[Tensor, Tensor, dict[str, Any]] | None = None

    def cross_entropy(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        with _versioned():
            if self._k is None:
                losses = ksam_kernels.cross_entropy(logits, target, **options)
            else:
                select = ksam_kernels.select_cross_entropy
                losses, self._indices = select(logits, target, self._k, **options)
        self._losses, self._version = losses, losses._version
        self._inputs = logits.detach(), target, options
        return losses

    def _made(self, losses: Tensor) -> bool:
        """Whether these are the losses of the fused call, and nobody wrote to them since."""
        return losses is self._losses and losses._version == self._version

    def kept(self, losses: Tensor) -> Tensor:
        """The losses, detached, in memory that no later call of the function writes to.

        A function that replays a CUDA graph (``torch.compile(mode="reduce-overhead")``) returns the
        same memory every time.
        """
        return losses.detach() if self._made(losses) else losses.detach().clone()

    def indices(self, losses: Tensor) -> Tensor:
        """The indices of the k largest losses."""
        assert self._k is not None
        if self._indices is not None and self._made(losses):
            return self._indices
        return ksam_kernels.topk_indices(losses.detach(), self._k)

    def scores(self, losses: Tensor) -> Tensor:
        """The gradient bound of every sample, float32 ``[B]``.

        With :func:`cross_entropy`, the norm of the loss's gradient with respect to the logits,
        ``||softmax(x) - onehot(y)||_2``. Times a factor that all samples share, it bounds the norm
        with respect to the weights (Katharopoulos & Fleuret 2018). Otherwise the loss itself, or 0
        where it is negative, so that shares of the sum are in [0, 1].
        """
        if self._inputs is None or not self._made(losses):
            return losses.detach().float().clamp_min(0)
        logits, target, options = self._inputs
        with torch.enable_grad():
            x = _differentiable(logits).requires_grad_()
            y = _differentiable(target)
            others = {name: _differentiable(value) for name, value in options.items()}
            total = ksam_kernels.cross_entropy(x, y, **others).sum()
            (gradient,) = torch.autograd.grad(total, x)
        norms: Tensor = torch.linalg.vector_norm(gradient.float(), dim=1)
        return norms


class _OfThread(threading.local):
    """What is recorded in this thread: several threads may train, each its own model."""

    active: Recording | None = None


_of_thread = _OfThread()


@contextmanager
def recording(batch_size: int, k: int | None = None) -> Iterator[Recording]:
    """Within, :func:`cross_entropy` of a whole batch is recorded and selects its k largest losses.

    Only calls in the same thread are recorded.
    """
    recorded = Recording(batch_size, k)
    previous = _of_thread.active
    try:
        _of_thread.active = recorded
        yield recorded
    finally:
        _of_thread.active = previous


def _records(logits: Tensor) -> Recording | None:
    """The recording that wants the loss of these logits, if there is one."""
    if torch.compiler.is_compiling():  # it would bake this step's selection into its graph
        return None
    if is_transformed():  # the samples of a transform's function need not be the batch's
        return None
    active = _of_thread.active
    if active is None or logits.dim() != 2 or logits.shape[0] != active.batch_size:
        return None
    return active


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Per-sample cross-entropy in float32: :func:`ksam_kernels.cross_entropy`, same arguments.

    Args:
        logits: floating, ``[..., C]``: the classes are the last dimension. For torch's
            ``[B, C, ...]`` pass ``logits.movedim(1, -1)``.
        target: classes, int64 ``[...]``, or probabilities, floating ``[..., C]``.
        weight, ignore_index, label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        float32 ``[...]``, one loss for every row of logits, even if the logits have 16 bits.

    In the selection pass of :meth:`ksam.KSAM.step` the loss and the top-k selection are one
    operator call, and policies take the gradient bounds from the logits.
    """
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    active = _records(logits)
    loss = ksam_kernels.cross_entropy if active is None else active.cross_entropy
    return loss(logits, target, **options)
