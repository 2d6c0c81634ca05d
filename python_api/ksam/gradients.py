"""What ``.grad`` holds while a step takes a gradient of its own there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ksam.distributed import data_parallel


@contextmanager
def set_aside(params: list[Tensor], model: nn.Module | None) -> Iterator[None]:
    """Within, ``.grad`` is None at first; then it is again what it was."""
    grads = [p.grad for p in params]
    if any(grad is not None for grad in grads):
        wrapped = data_parallel(model)
        if wrapped is not None and wrapped.gradient_as_bucket_view:
            # Views of memory that every backward pass writes.
            grads = [None if grad is None else grad.clone() for grad in grads]
    try:
        for p in params:
            p.grad = None
        yield
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
