"""How many samples a step selects, and the losses of the selection pass with their indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

import ksam_kernels
from ksam_kernels.checks import check_range

K = float | int
Schedule = Callable[[int], float | int]


def check_k(k: object) -> K:
    """A fraction in (0, 1] (float) or a count >= 1 (int)."""
    if isinstance(k, bool) or not isinstance(k, Real):
        raise TypeError(f"k must be a float in (0, 1] or an int >= 1, got {k!r}")
    if isinstance(k, Integral):
        if k < 1:
            raise ValueError(f"k as a count must be >= 1, got {k!r}")
        return int(k)
    if not 0.0 < float(k) <= 1.0:
        raise ValueError(f"k as a fraction must be in (0, 1], got {k!r}")
    return float(k)


def subset_size(k: K, batch_size: int) -> int:
    """Samples selected from a batch: max(1, round(k B)) for a fraction, min(k, B) for a count."""
    if isinstance(k, float):
        return max(1, round(k * batch_size))
    return min(k, batch_size)


def check_rho(value: object, name: str = "rho") -> float:
    """A finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0, got {value!r}")
    check_range(name, float(value), 0)
    return float(value)


class _Selection:
    """The fused loss-and-top-k call of a selection pass, if the loss function made one."""

    def __init__(self, batch_size: int, k: int) -> None:
        self.batch_size = batch_size
        self.k = k
        self._fused: tuple[Tensor, int, Tensor] | None = None

    def cross_entropy(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        losses, indices = ksam_kernels.select_cross_entropy(logits, target, self.k, **options)
        self._fused = losses, losses._version, indices
        return losses

    def indices(self, losses: Tensor) -> Tensor:
        """Those of the fused call, if these are its losses and nobody wrote to them since."""
        if self._fused is not None:
            fused_losses, version, indices = self._fused
            if losses is fused_losses and losses._version == version:
                return indices
        return ksam_kernels.topk_indices(losses, self.k)


_active: _Selection | None = None


@contextmanager
def selection_pass(batch_size: int, k: int) -> Iterator[_Selection]:
    """Within, :func:`cross_entropy` of a whole batch also selects its k largest losses."""
    global _active
    previous, _active = _active, _Selection(batch_size, k)
    try:
        with torch.no_grad():
            yield _active
    finally:
        _active = previous


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Per-sample cross-entropy in float32: :func:`ksam_kernels.cross_entropy`, same arguments.

    In the selection pass of :meth:`ksam.KSAM.step` the loss and the top-k selection are one
    operator call.
    """
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    selection = _active
    # A compiled function would bake this step's selection into its graph.
    if (
        selection is not None
        and not torch.compiler.is_compiling()
        and logits.dim() == 2
        and logits.shape[0] == selection.batch_size
    ):
        return selection.cross_entropy(logits, target, **options)
    return ksam_kernels.cross_entropy(logits, target, **options)
