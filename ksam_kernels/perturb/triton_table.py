"""Lists of tensors as tables on the device: what a Triton kernel needs to walk all rows in one go.

A *row* is what belongs to one parameter, an operand of each list. Its record is
``[numel, first chunk, aligned, value, address of operand 0, address of operand 1, ...]`` in int64.
Work is cut into chunks of CHUNK elements, one program each; ``chunk_rows`` says whose a chunk is.

Tables hold addresses and sizes only, so one is right for every call with the same ones: they are
kept by these, not by the tensors, and gradients that were freed and came back at their old
addresses find theirs. The stream is part of the key, since neither the upload nor the reuse of a
forgotten table's memory is ordered with other streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ksam_kernels.bits import as_bits
from ksam_kernels.triton_support import may_keep, stream_of, upload

__all__ = ["CHUNK", "HEAD", "Rows", "Table"]

#: Elements of a program: 16 for each of its 256 threads, four loads of 16 bytes in float32.
CHUNK = 4096
#: Entries of a record before the addresses.
HEAD = 4

#: Tables that are kept, of tens of bytes a row and 4 a chunk. A step of K-SAM needs two to four.
_KEPT = 32

Record = tuple[int, ...]


class Table(NamedTuple):
    """The rows of one combination of dtypes."""

    dtypes: tuple[torch.dtype, ...]  # of each operand
    records: Tensor  # int64 [rows, HEAD + operands]
    chunk_rows: Tensor  # int32 [chunks]

    @property
    def chunks(self) -> int:
        return self.chunk_rows.shape[0]


def _new_table(
    device: torch.device, stream: int, dtypes: tuple[torch.dtype, ...], records: tuple[Record, ...]
) -> Table:
    """``records`` without their first chunks."""
    values: list[int] = []
    chunks = 0
    for numel, *rest in records:
        values += (numel, chunks, *rest)
        chunks += -(-numel // CHUNK)
    table = upload(values, device).view(len(records), -1)
    counts = (table[:, 0] + (CHUNK - 1)) // CHUNK
    rows = torch.arange(len(records), dtype=torch.int32, device=device)
    return Table(dtypes, table, rows.repeat_interleave(counts, output_size=chunks))


_kept_table = lru_cache(maxsize=_KEPT)(_new_table)


def _layout(t: Tensor) -> list[tuple[int, int]] | None:
    """(dimension, stride) from the innermost dimension out, where the tensor is one piece of memory
    without gaps; else None."""
    dims = [d for d in range(t.dim()) if t.shape[d] > 1]
    order = sorted(((d, t.stride(d)) for d in dims), key=lambda pair: pair[1])
    expected = 1
    for d, stride in order:
        if stride != expected:
            return None
        expected *= t.shape[d]
    return order


def _are_alike(row: Sequence[Tensor]) -> bool:
    """One walk through memory meets the elements of all operands in the same order."""
    if any(t.is_neg() for t in row):
        return False
    if all(t.is_contiguous() for t in row):
        return True
    first = _layout(row[0])
    return first is not None and all(_layout(t) == first for t in row[1:])


def _copy_bits(to: Tensor, source: Tensor) -> None:
    if to.is_neg() or source.is_neg():
        to.copy_(source)
    else:
        as_bits(to).copy_(as_bits(source))


class Rows:
    """The rows of a call that have elements, and what is left to do after its launches.

    A row whose operands are laid out in different ways, or with gaps, is worked on in contiguous
    copies, at the price of reading and writing each of those once more.
    """

    def __init__(
        self,
        *operands: list[Tensor],
        written: tuple[int, ...] = (),
        values: list[int] | None = None,
    ) -> None:
        """
        Args:
            operands: lists of equal lengths.
            written: the positions of the lists that are written.
            values: of each row, what a kernel finds in its record; all 0 by default.
        """
        self._written = written
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._tensors: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
        self._records: dict[tuple[torch.dtype, ...], list[Record]] = {}
        for i, row in enumerate(zip(*operands, strict=True)):
            if row[0].numel() > 0:
                self._add(row, 0 if values is None else values[i])

    def _add(self, row: tuple[Tensor, ...], value: int) -> None:
        used = row if _are_alike(row) else self._contiguous(row)
        pointers = [t.data_ptr() for t in used]
        aligned = int(all(pointer % 16 == 0 for pointer in pointers))
        dtypes = tuple(t.dtype for t in used)
        self._tensors.setdefault(dtypes, []).append(used)
        self._records.setdefault(dtypes, []).append((used[0].numel(), aligned, value, *pointers))

    def _contiguous(self, row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        copies = []
        for i, t in enumerate(row):
            copy = t
            if t.is_neg() or not t.is_contiguous():
                copy = torch.empty(t.shape, dtype=t.dtype, device=t.device)
                _copy_bits(copy, t)
                if i in self._written:
                    self._copied.append((t, copy))
            copies.append(copy)
        return tuple(copies)

    def tables(self) -> list[Table]:
        """One for each combination of dtypes. In a graph they are new, and the graph's own."""
        made = []
        for dtypes, records in self._records.items():
            device = self._tensors[dtypes][0][0].device
            make = _kept_table if may_keep(device) else _new_table
            made.append(make(device, stream_of(device), dtypes, tuple(records)))
        return made

    def tensors(self, table: Table) -> list[tuple[Tensor, ...]]:
        """The rows of a table: the tensors that the kernels work on."""
        return self._tensors[table.dtypes]

    def finish(self) -> None:
        """What was written to copies, back to where it belongs."""
        for t, copy in self._copied:
            _copy_bits(t, copy)
