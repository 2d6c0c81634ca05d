"""Batches as trees: which of their tensors hold one row per sample, and how to replace them."""

from __future__ import annotations

import copy
import dataclasses
import reprlib
from collections import Counter, UserDict
from collections.abc import Callable
from functools import cached_property
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_is_leaf, tree_map


def map_batched(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with ``fn`` applied to every tensor that has dimensions, in a fixed order.

    Tensors without dimensions and leaves that are no tensors pass through.
    """
    return map_tensors(lambda tensor: fn(tensor) if tensor.dim() > 0 else tensor, batch)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with ``fn`` applied to every tensor, in a fixed order; other leaves pass through."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        return fn(tree)
    if kind is dict:  # the usual nodes without tree_map, which takes several us for each
        # A list of them, as another thread may change the dict meanwhile.
        return {key: map_tensors(fn, value) for key, value in list(tree.items())}
    if kind is tuple or kind is list:
        return kind([map_tensors(fn, value) for value in tree])
    if isinstance(tree, tuple) and hasattr(kind, "_fields"):  # a namedtuple
        return _map_tuple(fn, tree)
    if not tree_is_leaf(tree):  # its children, without descending further
        return tree_map(lambda x: map_tensors(fn, x), tree, is_leaf=lambda x: x is not tree)
    if isinstance(tree, Counter):  # numbers, which its update would add up
        return tree.copy()
    if isinstance(tree, (dict, UserDict)):  # Hugging Face's BatchEncoding for one
        mapping = copy.copy(tree)
        mapping.update({key: map_tensors(fn, value) for key, value in tree.items()})
        return mapping
    if isinstance(tree, list):
        sequence = copy.copy(tree)
        sequence[:] = [map_tensors(fn, value) for value in tree]
        return sequence
    if isinstance(tree, tuple) and not isinstance(tree, torch.Size):
        return _map_tuple(fn, tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _map_dataclass(fn, tree)
    return tree


def _map_tuple(fn: Callable[[Tensor], Tensor], tree: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tuple of the same subclass, made without its ``__new__``, which may take other arguments;
    the tuple itself if nothing in it is replaced: an enumeration's member has no copies, and
    ``time.struct_time`` cannot be made this way."""
    values = [map_tensors(fn, value) for value in tree]
    if all(new is old for new, old in zip(values, tree, strict=True)):
        return tree
    rows = tuple.__new__(type(tree), values)
    if hasattr(tree, "__dict__"):
        vars(rows).update(vars(tree))
    return rows


def _map_dataclass(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A copy made without ``__init__`` and ``__post_init__``, which would process already processed
    fields again."""
    kind: Any = type(tree)
    mapped = kind.__new__(kind)
    for name in [*_slots(tree), *getattr(tree, "__dict__", ())]:
        if not isinstance(getattr(kind, name, None), cached_property):  # it is computed anew
            # Not setattr, which a frozen dataclass refuses.
            object.__setattr__(mapped, name, map_tensors(fn, getattr(tree, name)))
    return mapped


def _slots(tree: Any) -> list[str]:
    """The names of the object's filled slots, those of its bases included."""
    made_of = [vars(kind) for kind in type(tree).__mro__ if "__slots__" in vars(kind)]
    names = [n for of in made_of for n in of if isinstance(of[n], MemberDescriptorType)]
    return [name for name in names if hasattr(tree, name)]


def batched_tensors(batch: Any) -> list[Tensor]:
    """Every tensor of the batch that has dimensions, in the order of :func:`map_batched`."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_batched(collect, batch)
    return found


_ADVICE = "pass torch.arange(B) as the batch, and look the samples up in the function"
#: How many tensors an error describes.
_DESCRIBED = 6


def _paths(batch: Any, tensors: list[Tensor]) -> list[str]:
    """Where each tensor stands in the batch, if the tree knows it: ``batch['x']``."""
    paths = {id(leaf): f"batch{keystr(path)}" for path, leaf in tree_flatten_with_path(batch)[0]}
    return [paths.get(id(tensor), "an inner object of batch") for tensor in tensors]


def _describe(batch: Any, tensors: list[Tensor]) -> str:
    """The sizes of dimension 0 in words: ``batch['x']: 8, batch['y']: 7``.

    If there are many tensors, only the first ones and the first of another size.
    """
    paths = _paths(batch, tensors)
    named = [f"{path}: {t.size(0)}" for path, t in zip(paths, tensors, strict=True)]
    if len(named) <= _DESCRIBED:
        return ", ".join(named)
    other = next(i for i, t in enumerate(tensors) if t.size(0) != tensors[0].size(0))
    shown = [*named[: _DESCRIBED - 1], named[max(other, _DESCRIBED - 1)]]
    return f"{', '.join(shown)}, ... of {len(named)} tensors"


def check_dense(batch: Any, tensors: list[Tensor]) -> None:
    """Raise TypeError unless every tensor has rows of plain numbers in memory."""
    for i, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind: object = tensor.dtype if tensor.is_quantized else tensor.layout
            kind = "a nested one" if tensor.is_nested else kind
            raise TypeError(
                f"batch must hold dense tensors, got {kind} at {_paths(batch, tensors)[i]}; "
                f"{_ADVICE}"
            )


def check_without_graph(batch: Any, tensors: list[Tensor]) -> None:
    """Raise ValueError if a tensor was computed from what wants a gradient: the gather would cut it
    off."""
    for i, tensor in enumerate(tensors):
        if tensor.requires_grad and not tensor.is_leaf:
            raise ValueError(
                f"batch must hold tensors without a graph, as a step makes several backward "
                f"passes, got one with {tensor.grad_fn} at {_paths(batch, tensors)[i]}; compute it "
                f"in the function, or detach it"
            )


def check_same_rows(batch: Any, tensors: list[Tensor]) -> None:
    """Raise ValueError unless every tensor has the same size in dimension 0."""
    # Not a set of them: sizes that torch.export leaves open cannot be hashed. Nested tensors have a
    # size of dimension 0 and may have no shape.
    if any(tensor.size(0) != tensors[0].size(0) for tensor in tensors):
        raise ValueError(
            f"batch must have the same size in dimension 0 of all tensors, got "
            f"{_describe(batch, tensors)}; if samples differ in size, {_ADVICE}"
        )


def batch_size(batch: Any) -> int:
    """The number of samples: the size of dimension 0 on which every tensor of the batch agrees.

    Raises:
        ValueError: the tensors disagree, or the batch holds no tensor with dimensions.
    """
    tensors = batched_tensors(batch)
    if not tensors:
        raise ValueError(
            "batch must hold a tensor with the samples in dimension 0, got " + reprlib.repr(batch)
        )
    check_same_rows(batch, tensors)
    return tensors[0].size(0)
