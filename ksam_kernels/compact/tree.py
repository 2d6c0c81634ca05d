"""Batches as trees: which of their tensors hold one row per sample, and how to replace them."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_is_leaf, tree_map


def map_batched(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with ``fn`` applied to every tensor that has dimensions, in a fixed order.

    Tensors without dimensions and leaves that are no tensors pass through.
    """
    kind = type(batch)
    if isinstance(batch, Tensor):
        return fn(batch) if batch.dim() > 0 else batch
    if kind is dict:  # the usual nodes without tree_map, which takes several us for each
        return {key: map_batched(fn, value) for key, value in batch.items()}
    if kind is tuple or kind is list:
        return kind([map_batched(fn, value) for value in batch])
    if not tree_is_leaf(batch):  # its children, without descending further
        return tree_map(lambda x: map_batched(fn, x), batch, is_leaf=lambda x: x is not batch)
    if isinstance(batch, UserDict):  # Hugging Face's BatchEncoding
        return kind({key: map_batched(fn, value) for key, value in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f.name for f in dataclasses.fields(batch) if f.init]
        changes = {name: map_batched(fn, getattr(batch, name)) for name in fields}
        return dataclasses.replace(batch, **changes)
    return batch


def batched_tensors(batch: Any) -> list[Tensor]:
    """Every tensor of the batch that has dimensions, in the order of :func:`map_batched`."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_batched(collect, batch)
    return found


def _describe(batch: Any, tensors: list[Tensor]) -> str:
    """``['x'] 8, ['y'] 7``: the sizes of dimension 0, by path where the tree knows one."""
    paths = {id(leaf): f"batch{keystr(path)}" for path, leaf in tree_flatten_with_path(batch)[0]}
    return ", ".join(f"{paths.get(id(t), 'a nested tensor')}: {t.shape[0]}" for t in tensors)


def check_same_rows(batch: Any, tensors: list[Tensor]) -> None:
    """Every tensor has the same size in dimension 0."""
    if len({tensor.shape[0] for tensor in tensors}) > 1:
        raise ValueError(
            f"batch must have one size in dimension 0, got {_describe(batch, tensors)}"
        )


def batch_size(batch: Any) -> int:
    """The number of samples: the size of dimension 0 on which every tensor of the batch agrees.

    Raises:
        ValueError: the tensors disagree, or the batch holds no tensor with dimensions.
    """
    tensors = batched_tensors(batch)
    if not tensors:
        raise ValueError(f"batch must hold a tensor with the samples in dimension 0, got {batch!r}")
    check_same_rows(batch, tensors)
    return tensors[0].shape[0]
