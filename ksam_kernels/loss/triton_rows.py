"""Where rows lie, and which of them a program has: what the room's Triton kernels share.

Rows [rows, columns] lie apart or, in PLANES, side by side: [groups, columns, group]. What a program
loads from outside of its rows has no particular value, and ``where`` takes it out before it counts.

Launches are not specialized for addresses, strides or sizes. What is known of them comes from
shapes and dtypes (VECTOR elements, see ``vector_of``) and is stated of results: Triton would ignore
it if stated of arguments.

Named tuples hold tensors only: Triton 3.6 makes tensors of the constants in them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """The rows of a program; in planes all of one group."""

    number: tl.tensor  # [ROWS] int64
    inside: tl.tensor  # [ROWS], whether there is such a row
    group: tl.tensor  # the number of their group; without groups, of the program


class Matrix(NamedTuple):
    """Where the rows of a program lie."""

    start: tl.tensor  # address of row 0; in planes, as if all groups lay as the program's does
    stride: tl.tensor  # from one row to the next; in planes, from one column to the next


class Tile(NamedTuple):
    """The elements that a program has at once."""

    row: tl.tensor  # [ROWS] int64
    column: tl.tensor  # [BLOCK]
    column_inside: tl.tensor  # [BLOCK], whether there is such a column
    inside: tl.tensor  # [ROWS, BLOCK], whether there is such an element


@triton.jit
def multiple(n, VECTOR: tl.constexpr):
    """n, which is a multiple of VECTOR."""
    return n // VECTOR * VECTOR


@triton.jit
def count_of(columns, INDEX: tl.constexpr, VECTOR: tl.constexpr, PLANES: tl.constexpr):
    """The number of columns, in the dtype that counts them."""
    if PLANES:  # whose vectors go along the rows
        return columns.to(INDEX)
    else:
        return multiple(columns, VECTOR).to(INDEX)


@triton.jit
def part_of_rows(columns, BLOCK: tl.constexpr):
    """Where a program has only one part of its rows: the number that it would have with whole rows,
    and its first column. Programs with parts of the same rows are next to each other."""
    parts = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    return program // parts, (program % parts) * BLOCK


@triton.jit
def rows_apart(program, rows, ROWS: tl.constexpr):
    """The rows of a program where all `rows` lie apart."""
    program = program.to(tl.int64)
    number = program * ROWS + tl.arange(0, ROWS)
    return Rows(number, number < rows, program)


@triton.jit
def rows_of(program, rows, group, ROWS: tl.constexpr, VECTOR: tl.constexpr, PLANES: tl.constexpr):
    """The rows of a program where all `rows` lie apart or, in planes, in groups of `group`."""
    if PLANES:
        group = multiple(group, VECTOR)
        parts = tl.cdiv(group, ROWS)
        number = (program // parts).to(tl.int64)
        within = (program % parts) * ROWS + tl.arange(0, ROWS)
        return Rows(number * group + within, within < group, number)
    else:
        return rows_apart(program, rows, ROWS)


@triton.jit
def matrix_of(start, stride, rows, group, VECTOR: tl.constexpr, PLANES: tl.constexpr):
    """Where a program's `rows` lie. stride: from one row to the next; in planes, from one group."""
    if PLANES:
        gap = multiple(stride, VECTOR) - multiple(group, VECTOR)
        return Matrix(start + rows.group * gap, group)
    else:
        return Matrix(start, stride)


@triton.jit
def tile_of(rows, start, columns, BLOCK: tl.constexpr):
    """BLOCK columns of a program's `rows`, from column `start` on."""
    column = (start + tl.arange(0, BLOCK)).to(columns.dtype)
    column_inside = column < columns
    inside = rows.inside[:, None] & column_inside[None, :]
    return Tile(rows.number, column, column_inside, inside)


@triton.jit
def elements_of(matrix, tile, VECTOR: tl.constexpr, PLANES: tl.constexpr):
    """Addresses [ROWS, BLOCK]; VECTOR elements side by side begin at a multiple of their bytes.

    That is stated of the whole tile: of rows alone, Triton might apply it to a scalar and fail. And
    it is stated where addresses are added up: of what a function returns, Triton 3.6 and 3.7 would
    forget it.
    """
    BYTES: tl.constexpr = matrix.start.dtype.element_ty.primitive_bitwidth // 8
    row, column = tile.row[:, None], tile.column[None, :]
    stride = multiple(matrix.stride, VECTOR)
    if PLANES:
        return tl.multiple_of(matrix.start + row + column * stride, [VECTOR * BYTES, BYTES])
    else:
        return tl.multiple_of(matrix.start + row * stride + column, [BYTES, VECTOR * BYTES])


@triton.jit
def weights_of(weight, tile, A: tl.constexpr, VECTOR: tl.constexpr):
    """Weights [1, BLOCK] of columns; 0 outside."""
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    at = tl.multiple_of(weight + tile.column, VECTOR * BYTES)
    return tl.load(at, mask=tile.column_inside, other=0).to(A)[None, :]
