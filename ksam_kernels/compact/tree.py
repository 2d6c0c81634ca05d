"""Batches as trees: which of their tensors hold one row per sample, and how to replace them."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
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
        # A list of them, as another thread may change the dict meanwhile.
        return {key: map_batched(fn, value) for key, value in list(batch.items())}
    if kind is tuple or kind is list:
        return kind([map_batched(fn, value) for value in batch])
    if not tree_is_leaf(batch):  # its children, without descending further
        return tree_map(lambda x: map_batched(fn, x), batch, is_leaf=lambda x: x is not batch)
    if isinstance(batch, (dict, UserDict)):  # Hugging Face's BatchEncoding for one
        mapping = copy.copy(batch)
        mapping.update({key: map_batched(fn, value) for key, value in batch.items()})
        return mapping
    if isinstance(batch, list):
        sequence = copy.copy(batch)
        sequence[:] = [map_batched(fn, value) for value in batch]
        return sequence
    if isinstance(batch, tuple) and not isinstance(batch, torch.Size):
        rows = tuple.__new__(kind, [map_batched(fn, value) for value in batch])
        if hasattr(batch, "__dict__"):
            vars(rows).update(vars(batch))
        return rows
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _map_dataclass(fn, batch)
    return batch


def _map_dataclass(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    fields = [f.name for f in dataclasses.fields(batch) if f.init]
    changes = {name: map_batched(fn, getattr(batch, name)) for name in fields}
    try:
        return dataclasses.replace(batch, **changes)
    except ValueError as error:  # a value that only __init__ saw
        raise TypeError(f"batch holds a {type(batch).__name__}: {error}") from error


def batched_tensors(batch: Any) -> list[Tensor]:
    """Every tensor of the batch that has dimensions, in the order of :func:`map_batched`."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_batched(collect, batch)
    return found


def _paths(batch: Any, tensors: list[Tensor]) -> list[str]:
    """Where the tensors stand in the batch, where the tree knows it."""
    paths = {id(leaf): f"batch{keystr(path)}" for path, leaf in tree_flatten_with_path(batch)[0]}
    return [paths.get(id(tensor), "a nested tensor") for tensor in tensors]


def _describe(batch: Any, tensors: list[Tensor]) -> str:
    """``batch['x']: 8, batch['y']: 7``, the sizes of dimension 0."""
    paths = _paths(batch, tensors)
    return ", ".join(f"{path}: {t.size(0)}" for path, t in zip(paths, tensors, strict=True))


def check_dense(batch: Any, tensors: list[Tensor]) -> None:
    """Every tensor has rows of plain numbers in memory."""
    for i, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind: object = tensor.dtype if tensor.is_quantized else tensor.layout
            kind = "a nested one" if tensor.is_nested else kind
            raise TypeError(
                f"batch must hold dense tensors, got {kind} at {_paths(batch, tensors)[i]}"
            )


def check_same_rows(batch: Any, tensors: list[Tensor]) -> None:
    """Every tensor has the same size in dimension 0."""
    # Not a set of them: sizes that torch.export leaves open cannot be hashed. Nested tensors have a
    # size of dimension 0 and may have no shape.
    if any(tensor.size(0) != tensors[0].size(0) for tensor in tensors):
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
    return tensors[0].size(0)
