"""The Triton kernel of the compact room: one launch for all leaves of a batch."""

from __future__ import annotations

import triton
import triton.language as tl

from ksam_kernels.triton_assert import check


@triton.jit
def _move(
    source, out, vector, begin, readable, here, ITEM: tl.constexpr, ITEMS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile of vectors of ITEMS items each, from places in the source to neighbours in the output.

    source, out: addresses; vector [TILE]: places in vectors; begin: the tile's first vector.
    """
    source, out = source.to(tl.pointer_type(ITEM)), out.to(tl.pointer_type(ITEM))
    if ITEMS > 1:
        source, out = tl.multiple_of(source, 16), tl.multiple_of(out, 16)
    item = tl.arange(0, ITEMS)[None, :]
    from_ = source + (vector[:, None] * ITEMS + item)
    lanes = begin + tl.arange(0, TILE)
    data = tl.load(from_, mask=readable[:, None] & (item < ITEMS), other=0)
    tl.store(out + (lanes[:, None] * ITEMS + item), data, mask=here[:, None] & (item < ITEMS))


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
    firsts = tl.load(table + tl.arange(0, LEAVES))
    leaf = table + tl.sum((firsts <= program).to(tl.int32)) - 1
    source, out = tl.load(leaf + LEAVES), tl.load(leaf + 2 * LEAVES)
    log2_vector = tl.load(leaf + 6 * LEAVES)
    row_vectors = tl.load(leaf + 3 * LEAVES) >> log2_vector
    source_stride = tl.load(leaf + 4 * LEAVES) >> log2_vector
    rows = tl.load(leaf + 5 * LEAVES)

    # Where each vector is: the tile's first one by a division of 64 bits, the others from there. A
    # row is either longer than a tile, which then reaches into one more at most, or short.
    begin = (program - tl.load(leaf)) * TILE
    first_row = begin // row_vectors
    first_column = begin - first_row * row_vectors
    lanes = tl.arange(0, TILE)
    if row_vectors <= TILE:
        past = (first_column.to(tl.int32) + lanes) // row_vectors.to(tl.int32)
    else:
        past = (lanes >= row_vectors - first_column).to(tl.int32)
    column = first_column + lanes - past * row_vectors
    here = lanes < k.to(tl.int64) * row_vectors - begin

    at = (first_row + past) * index_stride.to(tl.int64)
    index = tl.load(indices + at, mask=here, other=0)
    in_range = (index >= 0) & (index < rows)
    check(in_range | (here == 0), "index in range", TRAPS)
    # Nothing is read out of range, whatever becomes of the check. Widened after the choice: Triton
    # 3.7 cannot compile one between widened indices and 0.
    readable = here & in_range
    vector = tl.where(readable, index, 0).to(tl.int64) * source_stride + column

    if log2_vector == 4:  # no integer has 16 bytes: two of 8, which are loaded as one vector
        _move(source, out, vector, begin, readable, here, tl.int64, 2, TILE)
    elif log2_vector == 3:
        _move(source, out, vector, begin, readable, here, tl.int64, 1, TILE)
    elif log2_vector == 2:
        _move(source, out, vector, begin, readable, here, tl.int32, 1, TILE)
    elif log2_vector == 1:
        _move(source, out, vector, begin, readable, here, tl.int16, 1, TILE)
    else:
        _move(source, out, vector, begin, readable, here, tl.int8, 1, TILE)
