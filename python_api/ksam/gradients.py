"""What ``.grad`` holds while a step takes a gradient of its own there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


def _copy_of_view(grad: Tensor) -> Tensor | None:
    """A copy of what may be written in the meantime: DistributedDataParallel's gradients are views
    of memory that every pass writes."""
    return grad.clone() if grad._is_view() else None


def clear(params: Sequence[Tensor]) -> None:
    """What ``zero_grad()`` does, without its bookkeeping, which takes twice as long as the work."""
    for p in params:
        p.grad = None


@contextmanager
def set_aside(params: list[Tensor]) -> Iterator[bool]:
    """Within, ``.grad`` is None at first; afterwards it is again what it was, views the same views.
    Yields whether there was any."""
    aside = [(p, grad, _copy_of_view(grad)) for p in params if (grad := p.grad) is not None]
    try:
        for p, _, _ in aside:
            p.grad = None
        yield bool(aside)
    finally:
        clear(params)
        for p, grad, copy in aside:
            if copy is not None:
                grad.copy_(copy)
            p.grad = grad
