"""The Triton kernel of the compact room: one launch for all leaves of a batch.

Named tuples hold tensors only: Triton 3.6 makes tensors of the constants in them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ksam_kernels.triton_assert import check


class Leaf(NamedTuple):
    """A column of the table, in vectors of the leaf."""

    first_tile: tl.tensor
    source: tl.tensor  # address
    out: tl.tensor  # address
    row_vectors: tl.tensor
    source_stride: tl.tensor  # vectors from one row to the next
    rows: tl.tensor  # of the source
    log2_vector: tl.tensor  # bytes


class Tile(NamedTuple):
    """The vectors [TILE] that a program copies, neighbours in the output."""

    begin: tl.tensor  # place of the first in the output
    here: tl.tensor  # which of them the output has
    source: tl.tensor  # their places in the source
    readable: tl.tensor  # which of them the source has


@triton.jit
def leaf_of(table, program, LEAVES: tl.constexpr):
    """The leaf that a program has a tile of."""
    firsts = tl.load(table + tl.arange(0, LEAVES))
    leaf = table + tl.sum((firsts <= program).to(tl.int32)) - 1
    log2_vector = tl.load(leaf + 6 * LEAVES)
    return Leaf(
        first_tile=tl.load(leaf),
        source=tl.load(leaf + LEAVES),
        out=tl.load(leaf + 2 * LEAVES),
        row_vectors=tl.load(leaf + 3 * LEAVES) >> log2_vector,
        source_stride=tl.load(leaf + 4 * LEAVES) >> log2_vector,
        rows=tl.load(leaf + 5 * LEAVES),
        log2_vector=log2_vector,
    )


@triton.jit
def row_and_column(begin, row_vectors, TILE: tl.constexpr):
    """Where in the output the vectors [TILE] from `begin` on are: the first one by a division of 64
    bits, the others relative to it. A row is either short, or longer than a tile, which then
    reaches into one more row at most."""
    first_row = begin // row_vectors
    first_column = begin - first_row * row_vectors
    lanes = tl.arange(0, TILE)
    if row_vectors <= TILE:
        past = (first_column.to(tl.int32) + lanes) // row_vectors.to(tl.int32)
    else:
        past = (lanes >= row_vectors - first_column).to(tl.int32)
    return first_row + past, first_column + lanes - past * row_vectors


@triton.jit
def chosen_rows(indices, stride, i, here, rows, TRAPS: tl.constexpr):
    """Rows indices[i] of the source, and which of them can be read: those that are `here` and in
    range. Nothing is read out of range, whatever becomes of the check."""
    index = tl.load(indices + i * stride.to(tl.int64), mask=here, other=0)
    in_range = (index >= 0) & (index < rows)
    check(in_range | (here == 0), "index in range", TRAPS)
    readable = here & in_range
    # Widened after the ``where``: Triton 3.7 cannot compile one between widened indices and 0.
    return tl.where(readable, index, 0).to(tl.int64), readable


@triton.jit
def move(leaf, tile, ITEM: tl.constexpr, ITEMS: tl.constexpr):
    """Copy vectors of ITEMS items each."""
    source = leaf.source.to(tl.pointer_type(ITEM))
    out = leaf.out.to(tl.pointer_type(ITEM))
    if ITEMS > 1:
        source, out = tl.multiple_of(source, 16), tl.multiple_of(out, 16)
    item = tl.arange(0, ITEMS)[None, :]
    from_ = source + (tile.source[:, None] * ITEMS + item)
    data = tl.load(from_, mask=tile.readable[:, None] & (item < ITEMS), other=0)
    place = tile.begin + tl.arange(0, tile.here.shape[0])
    to = out + (place[:, None] * ITEMS + item)
    tl.store(to, data, mask=tile.here[:, None] & (item < ITEMS))


@triton.jit(do_not_specialize=["index_stride", "k"])
def gather_kernel(
    # int64 [7, LEAVES]: first tile, source, out, bytes of a row, bytes from one source row to the
    # next, rows of the source, log2 of the bytes of a vector. Leaves that are not there begin
    # after the last tile.
    table,
    indices,  # int32 or int64 [k]
    index_stride: tl.int64,
    k: tl.int64,
    LEAVES: tl.constexpr,
    TILE: tl.constexpr,
    TRAPS: tl.constexpr,  # how an index out of range fails
):
    """out[i] = source[indices[i]] for every leaf. A program copies TILE vectors of an output.

    Bytes moved: every chosen row read and written once; of the indices one for each vector of a
    row, all but the first from the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    leaf = leaf_of(table, program, LEAVES)
    begin = (program - leaf.first_tile) * TILE
    i, column = row_and_column(begin, leaf.row_vectors, TILE)
    here = tl.arange(0, TILE) < k.to(tl.int64) * leaf.row_vectors - begin
    row, readable = chosen_rows(indices, index_stride, i, here, leaf.rows, TRAPS)
    tile = Tile(begin, here, row * leaf.source_stride + column, readable)

    if leaf.log2_vector == 4:  # no integer has 16 bytes: two of 8, which are loaded as one vector
        move(leaf, tile, tl.int64, 2)
    elif leaf.log2_vector == 3:
        move(leaf, tile, tl.int64, 1)
    elif leaf.log2_vector == 2:
        move(leaf, tile, tl.int32, 1)
    elif leaf.log2_vector == 1:
        move(leaf, tile, tl.int16, 1)
    else:
        move(leaf, tile, tl.int8, 1)
