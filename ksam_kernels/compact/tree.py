"""Batches as trees: which of their tensors hold one row per sample, and how to replace them."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map


def _map_leaf(fn: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    """A tensor, or a container that is no registered pytree node but is a batch all the same."""
    if isinstance(leaf, Tensor):
        return fn(leaf) if leaf.dim() > 0 else leaf
    if isinstance(leaf, UserDict):  # Hugging Face's BatchEncoding
        return type(leaf)({key: map_batched(fn, value) for key, value in leaf.items()})
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = [f.name for f in dataclasses.fields(leaf) if f.init]
        changes = {name: map_batched(fn, getattr(leaf, name)) for name in fields}
        return dataclasses.replace(leaf, **changes)
    return leaf


def map_batched(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with ``fn`` applied to every tensor that has dimensions, in a fixed order.

    Tensors without dimensions and leaves that are no tensors pass through.
    """
    return tree_map(lambda leaf: _map_leaf(fn, leaf), batch)


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
