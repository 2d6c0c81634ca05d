"""Batch compaction: the chosen rows of every tensor of a batch, gathered at once."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from ksam_kernels import library
from ksam_kernels.checks import INDEX, check_dtype
from ksam_kernels.compact import native
from ksam_kernels.compact.tree import batched_tensors, check_dense, check_same_rows, map_batched

__all__ = ["compact_batch"]

T = TypeVar("T")


def _gather(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    """One operator call per device, to which indices that lie elsewhere are copied once."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1:
        gathered: list[Tensor] = library.call("compact", tensors, indices.to(devices.pop()))
        return gathered
    rows = dict.fromkeys(range(len(tensors)), indices)
    for device in devices:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        rows.update(zip(places, _gather([tensors[i] for i in places], indices), strict=True))
    return list(rows.values())


def compact_batch(batch: T, indices: Tensor) -> T:
    """The sub-batch of the given samples: ``tensor[indices]`` for every tensor of a tree.

    Rows are moved as bytes: any dtype, bit-exact. The order and repeats of the indices are kept.
    Floor of bytes moved: each chosen row read once and written once, 8 per index.

    Args:
        batch: tuples, lists, dicts and their subclasses, dataclasses, Hugging Face
            ``BatchEncoding`` or any registered pytree, nested at will, of tensors ``[B, ...]``.
            Tensors without dimensions and leaves that are not tensors, **a list of strings
            included**, pass through unchanged. Dataclasses are copied without calling their
            constructor.
        indices: ``[k]``, int64 or int32, each in [0, B). May be empty. Tensors may be on another
            device than the indices, at the price of copying the indices there.

    Returns:
        The same tree with tensors ``[k, ...]``; contiguous, or channels-last where the source is.
        No gradient flows through the gather.

    Raises:
        TypeError: indices of another dtype, sparse, nested or quantized tensors.
        ValueError: indices that are not one-dimensional, tensors that disagree on dimension 0.
        IndexError: on the CPU, an index that is negative or too large (a GPU raises a device-side
            assertion instead).
    """
    quick: T | None = native.try_compact_batch(batch, indices)
    if quick is not None:
        return quick
    check_dtype("indices", indices, INDEX)
    if indices.dim() != 1:
        raise ValueError(f"indices must be one-dimensional, got shape {tuple(indices.shape)}")
    tensors = batched_tensors(batch)
    check_dense(batch, tensors)
    check_same_rows(batch, tensors)
    rows = iter(_gather([t.detach() if t.requires_grad else t for t in tensors], indices))
    compacted: T = map_batched(lambda _: next(rows), batch)
    return compacted
