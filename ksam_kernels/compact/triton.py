"""Batch compaction by a Triton kernel: one launch for all leaves.

The kernel is compiled by its first launch, which a CUDA graph cannot capture: run a step before.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ksam_kernels.compact import reference
from ksam_kernels.compact.operators import empty_rows
from ksam_kernels.compact.triton_kernels import gather_kernel
from ksam_kernels.triton_support import EXACT, assertions, device_ints, is_amd, on_device_of

#: Vectors of a program: four of up to 16 bytes for each of 256 threads, all in flight at once.
TILE, WARPS = 1024, 8
#: Fewest columns of the table; each power of two is a kernel of its own, and few batches have more.
LEAVES = 16

_NEVER = 2**62  # the first tile of a leaf that is not there


class Leaf(NamedTuple):
    """A column of the kernel's table without its first tile."""

    source: int  # address
    out: int  # address
    row_bytes: int
    source_stride: int  # bytes from one row to the next; 0 where all samples share one
    rows: int
    log2_vector: int  # the widest vectors, of 1 to 16 bytes, that divide all of them


def _leaf(tensor: Tensor, out: Tensor) -> Leaf | None:
    """The bytes to move, if the rows of ``tensor`` [B, ...] lie in memory as those of ``out`` [k,
    ...] do: without gaps, in the same order."""
    if tensor.is_conj() or tensor.is_neg():
        return None  # its memory holds other numbers
    for size, ours, theirs in zip(
        out.shape[1:], tensor.stride()[1:], out.stride()[1:], strict=True
    ):
        if size > 1 and ours != theirs:
            return None
    row_bytes = out[:1].numel() * out.itemsize
    stride = tensor.stride(0) * tensor.itemsize
    every = tensor.data_ptr() | out.data_ptr() | row_bytes | stride
    log2_vector = next(log2 for log2 in (4, 3, 2, 1, 0) if every % (1 << log2) == 0)
    return Leaf(tensor.data_ptr(), out.data_ptr(), row_bytes, stride, tensor.shape[0], log2_vector)


def _gather(leaves: list[Leaf], indices: Tensor) -> None:
    """One launch; the indices are not empty, and the leaves have bytes."""
    k = indices.shape[0]
    firsts, tiles = [], 0
    for leaf in leaves:
        firsts.append(tiles)
        tiles += -(-k * (leaf.row_bytes >> leaf.log2_vector) // TILE)
    columns = max(LEAVES, 1 << (len(leaves) - 1).bit_length())
    missing = columns - len(leaves)
    values = [*firsts, *[_NEVER] * missing]
    for field in zip(*leaves, strict=True):
        values += [*field, *[0] * missing]
    with on_device_of(indices):
        gather_kernel[(tiles,)](
            table=device_ints(tuple(values), indices.device),
            indices=indices,
            index_stride=indices.stride(0),
            k=k,
            LEAVES=columns,
            TILE=TILE,
            num_warps=WARPS,
            **EXACT,
            **assertions(amd=is_amd(indices.device)),
        )


def compact(
    tensors: list[Tensor],  # each [B, ...]
    indices: Tensor,  # [k]
) -> list[Tensor]:
    """Rows ``tensor[indices]`` [k, ...] of every tensor, moved as bytes.

    The device asserts that the indices are in range. Tensors whose rows have gaps or another order
    than the result's, and lazily conjugated or negated ones, are left to the reference.
    """
    k = indices.shape[0]
    gathered: list[Tensor] = []
    leaves: list[Leaf] = []
    for tensor in tensors:
        out = empty_rows(tensor, k)
        leaf = _leaf(tensor, out) if out.numel() > 0 else None
        if leaf is None and out.numel() > 0:
            out = reference.compact([tensor], indices)[0]
        elif leaf is not None:
            leaves.append(leaf)
        gathered.append(out)
    if leaves:
        _gather(leaves, indices)
    return gathered
