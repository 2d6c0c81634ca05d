"""What ``.grad`` holds while a step takes a gradient of its own there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


def _owned(grad: Tensor | None) -> Tensor | None:
    """A copy of a view, as DistributedDataParallel's are, of memory that every pass writes."""
    return grad.clone() if grad is not None and grad._is_view() else grad


@contextmanager
def set_aside(params: list[Tensor]) -> Iterator[bool]:
    """Within, ``.grad`` is None at first; then it is again what it was. Yields whether that is
    anything."""
    grads = [_owned(p.grad) for p in params]
    try:
        for p in params:
            p.grad = None
        yield any(grad is not None for grad in grads)
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
