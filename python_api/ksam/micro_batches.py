"""A pass over many samples as passes over few: gradient accumulation."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from torch import Tensor

from ksam.parts import Subset
from ksam_kernels.compact.tree import map_batched


def split(subset: Subset, size: int | None) -> list[Subset]:
    """Parts of at most ``size`` samples, in order; None: one part, the subset itself.

    As few parts as possible, as equal as possible: no last part of one sample, on which BatchNorm
    over vectors could not train. Their tensors are views.
    """
    if size is None or subset.samples <= size:
        return [subset]
    count = -(-subset.samples // size)
    bounds = [subset.samples * i // count for i in range(count + 1)]
    return [_rows(subset, begin, end) for begin, end in pairwise(bounds)]


def _slice(tensor: Tensor, begin: int, end: int) -> Tensor:
    """A leaf, as the tensor is one: a view made in a pass without gradients would have no graph."""
    rows = tensor.detach()[begin:end]
    return rows.requires_grad_(tensor.requires_grad)


def _rows(subset: Subset, begin: int, end: int) -> Subset:
    return dataclasses.replace(
        subset,
        batch=map_batched(lambda tensor: _slice(tensor, begin, end), subset.batch),
        samples=end - begin,
        indices=None if subset.indices is None else subset.indices[begin:end],
        weights=None if subset.weights is None else subset.weights[begin:end],
    )
