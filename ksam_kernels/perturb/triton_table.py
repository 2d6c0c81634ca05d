"""Lists of tensors as tables on the device: what a Triton kernel needs to walk all rows in one go.

A *row* is what belongs to one parameter: one operand from each list. Its record is
``[numel, first chunk, aligned, value, address of operand 0, address of operand 1, ...]`` in int64.
The extension (csrc/perturb/inspect_python.cpp) makes the same records of the lists.
Work is cut into chunks of CHUNK elements, one program each; ``chunk_rows`` has each chunk's row.

Tables hold addresses and sizes only, so one is right for every call that has the same: they are
cached by these, not by the tensors, and gradients that were freed and came back at their old
addresses find their table. The stream is part of the key, since neither the upload nor the reuse of
a forgotten table's memory is ordered with other streams.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ksam_kernels.bits import as_bits
from ksam_kernels.native import extension
from ksam_kernels.triton_support import may_cache_on, stream_of, upload

__all__ = ["CHUNK", "HEAD", "Rows", "Table"]

#: Elements of a program: 16 for each of its 256 threads, four loads of 16 bytes in float32.
CHUNK = 4096
#: Entries of a record before the addresses.
HEAD = 4

#: Tables that are kept, of tens of bytes a row and 4 a chunk. A step of K-SAM needs two to four.
_KEPT = 32

#: In the order in which the extension numbers them.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

DTypes = tuple[torch.dtype, ...]  # of a row's operands


class Table(NamedTuple):
    """The rows of one combination of dtypes."""

    dtypes: DTypes
    records: Tensor  # int64 [rows, HEAD + operands]
    chunk_rows: Tensor  # int32 [chunks]

    @property
    def chunks(self) -> int:
        return self.chunk_rows.shape[0]


def _chunk_rows(numels: Tensor, chunks: int) -> Tensor:
    """The row of each chunk, for rows of so many elements."""
    rows = torch.arange(len(numels), dtype=torch.int32, device=numels.device)
    counts = (numels + (CHUNK - 1)) // CHUNK
    return rows.repeat_interleave(counts, output_size=chunks)


@lru_cache(maxsize=_KEPT)
def _kept_chunk_rows(device: torch.device, stream: int, numels: bytes, chunks: int) -> Tensor:
    return _chunk_rows(upload(array("q", numels), device), chunks)


def _new_table(
    device: torch.device, stream: int, dtypes: DTypes, records: bytes, *, kept: bool = False
) -> Table:
    values = array("q", records)
    width = HEAD + len(dtypes)
    numel, first_chunk, *_ = values[-width:]
    chunks = first_chunk + -(-numel // CHUNK)
    table = upload(values, device).view(-1, width)
    if kept:  # addresses and values change from table to table, sizes do not
        numels = values[::width].tobytes()
        return Table(dtypes, table, _kept_chunk_rows(device, stream, numels, chunks))
    return Table(dtypes, table, _chunk_rows(table[:, 0], chunks))


_kept_table = lru_cache(maxsize=_KEPT)(partial(_new_table, kept=True))


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


def _are_contiguous(row: Sequence[Tensor]) -> bool:
    for t in row:  # noqa: SIM110  # a generator takes a quarter longer
        if t.is_neg() or not t.is_contiguous():
            return False
    return True


def _are_alike(row: Sequence[Tensor]) -> bool:
    """Whether one walk through memory meets the elements of all operands in the same order."""
    if _are_contiguous(row):
        return True
    if any(t.is_neg() for t in row):
        return False
    first = _layout(row[0])
    return first is not None and all(_layout(t) == first for t in row[1:])


def _copy_bits(to: Tensor, source: Tensor) -> None:
    if to.is_neg() or source.is_neg():
        to.copy_(source)
    else:
        as_bits(to).copy_(as_bits(source))


def _described(
    operands: tuple[list[Tensor], ...], values: list[int] | None
) -> dict[DTypes, bytes] | None:
    """The records, by the extension's one look at the lists; None where it has not looked, or rows
    must be copied."""
    found = None if extension is None else extension.describe(operands, values, CHUNK)
    if found is None:
        return None
    return {tuple([_DTYPES[kind] for kind in kinds]): records for kinds, records in found}


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
        #: Those that the kernels work on.
        self._rows: list[tuple[Tensor, ...]] = list(zip(*operands, strict=True))
        described = _described(operands, values)
        self._records = self._describe(values) if described is None else described

    def _describe(self, values: list[int] | None) -> dict[DTypes, bytes]:
        """Looks at every tensor, and copies what must be."""
        found: dict[DTypes, array[int]] = {}
        chunks: dict[DTypes, int] = {}
        for i, row in enumerate(self._rows):
            numel = row[0].numel()
            if numel == 0:
                continue
            if not _are_alike(row):
                row = self._rows[i] = self._contiguous(row)
            pointers = [t.data_ptr() for t in row]
            every = 0
            for pointer in pointers:
                every |= pointer
            dtypes = tuple([t.dtype for t in row])
            first_chunk = chunks.get(dtypes, 0)
            chunks[dtypes] = first_chunk - (-numel // CHUNK)
            value = 0 if values is None else values[i]
            record = (numel, first_chunk, every % 16 == 0, value, *pointers)
            found.setdefault(dtypes, array("q")).extend(record)
        return {dtypes: records.tobytes() for dtypes, records in found.items()}

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
        """A table for each combination of dtypes; in a capture new ones, which are the graph's."""
        if not self._records:
            return []
        device = self._rows[0][0].device
        make, stream = (_kept_table if may_cache_on(device) else _new_table), stream_of(device)
        return [make(device, stream, *item) for item in self._records.items()]

    def tensors(self, table: Table) -> list[tuple[Tensor, ...]]:
        """The rows of a table: the tensors that the kernels work on."""
        return [
            row
            for row in self._rows
            if row[0].numel() > 0 and tuple([t.dtype for t in row]) == table.dtypes
        ]

    def finish(self) -> None:
        """Copy what was written to copies back to where it belongs."""
        for t, copy in self._copied:
            _copy_bits(t, copy)
