"""The Triton kernels of cross-entropy: a program has whole rows, ROWS x BLOCK elements at a time.

The formulas are those of csrc/loss/loss_row.h. Every program loads what lies outside of its rows as
nothing in particular, and takes it out with ``where`` before it counts. Doubles come as their bits:
see :func:`ksam_kernels.triton_support.double_bits`.

Launches are not specialized for addresses, strides or sizes. What is known of them comes from
shapes and dtypes (VECTOR elements, ..._BYTES) and is said of results: of arguments, Triton would
not hear it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ksam_kernels.triton_assert import check
from ksam_kernels.triton_math import double_of

#: A class without spread; a class with smoothing; probabilities (target.cuh has the same).
CLASSES, SMOOTHED, PROBABILITIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_ROWS = ["logits", "logits_stride", "target", "target_stride", "weight", "rows", "columns", "group"]
_CLASSES = ["ignore_index", "kept", "share"]


@triton.jit
def multiple(n, VECTOR: tl.constexpr):
    """n, which is a multiple of VECTOR."""
    return n // VECTOR * VECTOR


@triton.jit
def elements_of(pointer, stride, row, column, VECTOR: tl.constexpr, BYTES: tl.constexpr):
    """Addresses [ROWS, BLOCK], of which those of VECTOR elements in a row are a multiple of BYTES.
    Said of the whole tile: of rows alone, Triton might apply it to a scalar and fail."""
    at = pointer + row[:, None] * multiple(stride, VECTOR) + column[None, :]
    return tl.multiple_of(at, [BYTES // VECTOR, BYTES])


@triton.jit
def plane_elements_of(pointer, stride, row, column, VECTOR: tl.constexpr, BYTES: tl.constexpr):
    """Addresses as :func:`elements_of`, of planes `stride` apart, with the rows side by side."""
    at = pointer + row[:, None] + column[None, :] * multiple(stride, VECTOR)
    return tl.multiple_of(at, [BYTES, BYTES // VECTOR])


@triton.jit
def columns_of(
    pointer,
    stride,
    row,
    column,
    VECTOR: tl.constexpr,
    BYTES: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Addresses [ROWS, BLOCK] of logits or probabilities, wherever they lie."""
    if PLANES:
        at = plane_elements_of(pointer, stride, row, column, VECTOR, BYTES)
    else:
        at = elements_of(pointer, stride, row, column, VECTOR, BYTES)
    return at


@triton.jit
def weights_of(weight, column, columns, A: tl.constexpr, BYTES: tl.constexpr):
    """Weights [BLOCK] of columns; 0 outside."""
    at = tl.multiple_of(weight + column, BYTES)
    return tl.load(at, mask=column < columns, other=0).to(A)


@triton.jit
def part_of(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS] and columns [BLOCK] of a program where each has one part of its rows, and which
    of them there are [ROWS, BLOCK]. Parts of the same rows are next to each other."""
    parts = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def rows_of_group(program, group, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Rows [ROWS] of a program, all of one group of planes, which of them there are [ROWS], and the
    number of the group."""
    group = multiple(group, VECTOR)
    parts = tl.cdiv(group, ROWS)
    number = (program // parts).to(tl.int64)
    at = (program % parts) * ROWS + tl.arange(0, ROWS)
    return number * group + at, at < group, number


@triton.jit
def first_plane(pointer, number, group_stride, group, VECTOR: tl.constexpr):
    """Address at which row 0 would be if all groups lay as the one of this number does."""
    return pointer + number * (multiple(group_stride, VECTOR) - multiple(group, VECTOR))


@triton.jit
def inputs_of_group(
    number,
    group,
    logits,
    logits_stride,
    target,
    target_stride,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
):
    """Logits and target for the rows of a group of planes, and the strides that they have there."""
    logits = first_plane(logits, number, logits_stride, group, VECTOR)
    if KIND == PROBABILITIES:
        target = first_plane(target, number, target_stride, group, TARGET_VECTOR)
        target_stride = group
    return logits, group, target, target_stride


@triton.jit
def origin(m):
    """What z is measured from: where all x so far are -inf, so are z from any number."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def class_of(
    target,  # [rows]
    target_stride,
    row,  # [ROWS]
    inside,  # [ROWS]
    columns,
    ignore_index,
    TRAPS: tl.constexpr,
):
    """Classes [ROWS] int64, and which of them count: those of rows there are, not ignored."""
    y = tl.load(target + row * target_stride, mask=inside, other=0).to(tl.int64)
    counts = inside & (y != ignore_index)
    valid = (y >= 0) & (y < columns)
    check(valid | (counts == 0), "target holds a class that is out of range", TRAPS)
    return y, counts & valid


@triton.jit
def hot_of(weight, y, counts, kept):
    """(1 - e) w_y [ROWS]; 0 in rows that do not count."""
    hot = tl.where(counts, kept, 0.0)
    if weight is not None:
        hot *= tl.load(weight + y, mask=counts, other=0).to(kept.dtype)
    return hot


@triton.jit
def spread_of(
    target,  # [rows, columns] probabilities, or something else
    target_stride,
    weight,  # [columns], or None
    row,  # [ROWS]
    column,  # [BLOCK]
    columns,
    inside,  # [ROWS, BLOCK]
    kept,
    share,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,  # of the target
    BYTES: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    PLANES: tl.constexpr,
):
    """q_c = w_c ((1 - e) t_c + e / C), without the first term for classes; 0 outside."""
    if KIND == PROBABILITIES:
        t = columns_of(target, target_stride, row, column, VECTOR, BYTES, PLANES)
        t = tl.load(t, mask=inside).to(share.dtype)
        q = tl.where(inside, kept * t + share, 0.0)
    else:
        q = tl.where(inside, share, 0.0)
    if weight is not None:
        q *= weights_of(weight, column, columns, share.dtype, WEIGHT_BYTES)[None, :]
    return q


@triton.jit(do_not_specialize=[*_ROWS, *_CLASSES])
def cross_entropy_kernel(
    logits,  # [rows, columns]
    logits_stride: tl.int64,
    target,  # [rows] classes or [rows, columns] probabilities
    target_stride: tl.int64,
    weight,  # [columns], or None
    losses,  # [rows] float32
    stats,  # [rows, 3]: m, log s, mass
    rows: tl.int64,
    columns,
    group: tl.int64,  # rows of a group of planes, which are as far apart
    ignore_index: tl.int64,
    kept: tl.int64,  # 1 - e, the bits of a double
    share: tl.int64,  # e / C, likewise
    A: tl.constexpr,  # dtype of the arithmetic
    INDEX: tl.constexpr,  # and of columns
    KIND: tl.constexpr,
    PLANES: tl.constexpr,  # logits and probabilities are [groups, columns, group]
    TRAPS: tl.constexpr,  # how a class out of range fails
    VECTOR: tl.constexpr,  # vector_of the logits
    TARGET_VECTOR: tl.constexpr,  # and of probabilities
    INPUT_BYTES: tl.constexpr,  # the same in bytes
    TARGET_BYTES: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPS: tl.constexpr,  # whether columns > BLOCK
):
    """loss = sum_c q_c (log s - z_c) with z_c = x_c - m, m = max x_c, s = sum exp z_c, in one pass.

    Each of ROWS x BLOCK lanes has a maximum of its own, which its sums are measured from, until
    they are put together. Bytes moved: each logit once, each probability where the target has
    them; per row a class, 4 for the loss, 12 for the statistics (float64: 24).
    """
    SPREADS: tl.constexpr = KIND != CLASSES
    kept, share = double_of(kept).to(A), double_of(share).to(A)
    if PLANES:
        columns = columns.to(INDEX)
        row, row_inside, number = rows_of_group(tl.program_id(0), group, ROWS, VECTOR)
        logits, logits_stride, target, target_stride = inputs_of_group(
            *(number, group, logits, logits_stride, target, target_stride),
            *(KIND, VECTOR, TARGET_VECTOR),
        )
    else:
        columns = multiple(columns, VECTOR).to(INDEX)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_inside = row < rows
    end = columns
    if KIND == PROBABILITIES:
        counts = row_inside
    else:
        y, counts = class_of(target, target_stride, row, row_inside, columns, ignore_index, TRAPS)
        if LOOPS:
            end = tl.max(tl.where(counts, columns, 0), 0)  # no more of rows that are ignored

    column = tl.arange(0, BLOCK).to(INDEX)
    inside = row_inside[:, None] & (column < columns)[None, :]
    x = columns_of(logits, logits_stride, row, column, VECTOR, INPUT_BYTES, PLANES)
    x = tl.load(x, mask=inside).to(A)
    m = tl.where(inside, x, float("-inf"))
    s = tl.where(m == float("-inf"), 0.0, m - m + 1.0)  # NaN for NaN and inf
    if SPREADS:
        mass = spread_of(
            *(target, target_stride, weight, row, column, columns, inside, kept, share),
            *(KIND, TARGET_VECTOR, TARGET_BYTES, WEIGHT_BYTES, PLANES),
        )
        dot = tl.where(inside, mass * (m - origin(m)), 0.0)
    if LOOPS:
        for start in range(BLOCK, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = row_inside[:, None] & (column < columns)[None, :]
            x = columns_of(logits, logits_stride, row, column, VECTOR, INPUT_BYTES, PLANES)
            x = tl.load(x, mask=inside).to(A)
            x = tl.where(inside, x, float("-inf"))
            # exp(x - m) or, where x is the new maximum, exp(m - x): one exponential for both.
            e = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - m)))
            rises = x > m
            s = tl.where(rises, s * e + 1.0, s + e)
            if SPREADS:
                q = spread_of(
                    *(target, target_stride, weight, row, column, columns, inside, kept, share),
                    *(KIND, TARGET_VECTOR, TARGET_BYTES, WEIGHT_BYTES, PLANES),
                )
                dot += tl.where(rises, mass * (origin(m) - x), 0.0)
                z = tl.where(rises, 0.0, x - origin(m))
                dot += tl.where(inside, q * z, 0.0)
                mass += q
            m = tl.where(rises, x, m)

    top = tl.max(m, 1)
    log_s = tl.log(tl.sum(s * tl.exp(m - top[:, None]), 1))  # NaN where all are -inf
    loss = tl.zeros([ROWS], A)
    total = tl.zeros([ROWS], A)
    if SPREADS:
        dot += mass * (origin(m) - origin(top)[:, None])
        total = tl.sum(mass, 1)
        loss = total * log_s - tl.sum(dot, 1)
    if KIND != PROBABILITIES:
        hot = hot_of(weight, y, counts, kept)
        if PLANES:
            at = logits + row + y * logits_stride
        else:
            at = logits + row * logits_stride + y
        x_y = tl.load(at, mask=counts, other=0).to(A)
        loss += hot * (log_s - (x_y - top))
        total += hot
    tl.store(losses + row, tl.where(counts, loss, 0.0), mask=row_inside)
    tl.store(stats + 3 * row, top, mask=row_inside)
    tl.store(stats + 3 * row + 1, log_s, mask=row_inside)
    tl.store(stats + 3 * row + 2, tl.where(counts, total, 0.0), mask=row_inside)


@triton.jit(do_not_specialize=[*_ROWS, *_CLASSES, "grad_stride"])
def cross_entropy_backward_kernel(
    grad,  # [rows]
    grad_stride: tl.int64,
    logits,  # [rows, columns]
    logits_stride: tl.int64,
    target,  # [rows] classes or [rows, columns] probabilities
    target_stride: tl.int64,
    stats,  # [rows, 3]
    weight,  # [columns], or None
    out,  # [rows, columns] or [groups, columns, group], contiguous
    rows: tl.int64,
    columns,
    group: tl.int64,  # rows of a group of planes, which are as far apart
    ignore_index: tl.int64,
    kept: tl.int64,  # 1 - e, the bits of a double
    share: tl.int64,  # e / C, likewise
    A: tl.constexpr,
    INDEX: tl.constexpr,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    TRAPS: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
    INPUT_BYTES: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx_c = g (mass p_c - q_c) with p_c = exp(x_c - m - log s); 0 in ignored rows.

    Bytes moved: each logit once, each element of the gradient once, each probability where the
    target has them; per row a class, 4 for g, 12 for the statistics (float64: 24).
    """
    kept, share = double_of(kept).to(A), double_of(share).to(A)
    if PLANES:
        columns = columns.to(INDEX)
        parts = tl.cdiv(columns, BLOCK)
        program = tl.program_id(0)
        column = (program % parts) * BLOCK + tl.arange(0, BLOCK)
        row, row_inside, number = rows_of_group(program // parts, group, ROWS, VECTOR)
        inside = row_inside[:, None] & (column < columns)[None, :]
        logits, logits_stride, target, target_stride = inputs_of_group(
            *(number, group, logits, logits_stride, target, target_stride),
            *(KIND, VECTOR, TARGET_VECTOR),
        )
        out = first_plane(out, number, columns * group, group, VECTOR)
    else:
        columns = multiple(columns, VECTOR).to(INDEX)
        row, column, inside = part_of(rows, columns, ROWS, BLOCK)
        row_inside = row < rows
    if KIND == PROBABILITIES:
        counts = row_inside
    else:
        y, counts = class_of(target, target_stride, row, row_inside, columns, ignore_index, TRAPS)
    g = tl.load(grad + row * grad_stride, mask=row_inside).to(A)
    m = tl.load(stats + 3 * row, mask=row_inside)
    log_s = tl.load(stats + 3 * row + 1, mask=row_inside)
    mass = tl.load(stats + 3 * row + 2, mask=row_inside)
    x = columns_of(logits, logits_stride, row, column, VECTOR, INPUT_BYTES, PLANES)
    x = tl.load(x, mask=inside).to(A)
    dx = mass[:, None] * tl.exp(x - m[:, None] - log_s[:, None])
    if KIND != CLASSES:
        dx -= spread_of(
            *(target, target_stride, weight, row, column, columns, inside, kept, share),
            *(KIND, TARGET_VECTOR, TARGET_BYTES, WEIGHT_BYTES, PLANES),
        )
    if KIND != PROBABILITIES:
        hot = hot_of(weight, y, counts, kept)
        dx -= tl.where(column[None, :] == y[:, None], hot[:, None], 0.0)
    dx = tl.where(counts[:, None], g[:, None] * dx, 0.0)
    if PLANES:
        at = plane_elements_of(out, group, row, column, VECTOR, INPUT_BYTES)
    else:
        at = out + row[:, None] * columns + column[None, :]
    tl.store(at, dx, mask=inside)
