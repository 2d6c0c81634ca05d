"""The Triton kernels of the loss room: a program has whole rows, ROWS x BLOCK elements at a time.

The formulas are those of csrc/loss/loss_row.h and csrc/loss/elementwise.h. Every program loads what
lies outside of its rows as nothing in particular, and takes it out with ``where`` before it counts.
Doubles come as their bits: see :func:`ksam_kernels.triton_support.double_bits`.

Launches are not specialized for addresses, strides or sizes. What is known of them comes from
shapes and dtypes (VECTOR elements, ..._BYTES) and is said of results: of arguments, Triton would
not hear it.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: A class without spread; a class with smoothing; probabilities (target.cuh has the same).
CLASSES, SMOOTHED, PROBABILITIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_ROWS = ["logits", "logits_stride", "target", "target_stride", "weight", "rows", "columns"]
_CLASSES = ["ignore_index", "kept", "share"]
_SAMPLES = ["input", "input_stride", "target", "target_stride", "weight", "rows", "columns"]


@triton.jit
def double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def multiple(n, VECTOR: tl.constexpr):
    """n, which is a multiple of VECTOR."""
    return n // VECTOR * VECTOR


@triton.jit
def rows_of(pointer, row, stride, VECTOR: tl.constexpr, BYTES: tl.constexpr):
    """Addresses [ROWS, 1] of rows, all of them multiples of BYTES."""
    return tl.multiple_of(pointer + row[:, None] * multiple(stride, VECTOR), [BYTES, BYTES])


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
):
    """Classes [ROWS] int64, and which of them count: those of rows there are, not ignored."""
    y = tl.load(target + row * target_stride, mask=inside, other=0).to(tl.int64)
    counts = inside & (y != ignore_index)
    valid = (y >= 0) & (y < columns)
    tl.device_assert(valid | (counts == 0), "target holds a class that is out of range")
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
    target,  # [ROWS, BLOCK] addresses of probabilities, or None
    weight,  # [columns], or None
    column,  # [BLOCK]
    columns,
    inside,  # [ROWS, BLOCK]
    kept,
    share,
    WEIGHT_BYTES: tl.constexpr,
):
    """q_c = w_c ((1 - e) t_c + e / C), without the first term for classes; 0 outside."""
    q = tl.where(inside, share, 0.0)
    if target is not None:
        t = tl.load(target, mask=inside, other=0).to(share.dtype)
        q = tl.where(inside, kept * t + share, 0.0)
    if weight is not None:
        q *= weights_of(weight, column, columns, share.dtype, WEIGHT_BYTES)[None, :]
    return q


@triton.jit(do_not_specialize=[*_ROWS, *_CLASSES])
def cross_entropy_kernel(
    logits,  # [rows, columns]
    logits_stride,
    target,  # [rows] classes or [rows, columns] probabilities
    target_stride,
    weight,  # [columns], or None
    losses,  # [rows] float32
    stats,  # [rows, 3]: m, log s, mass
    rows,
    columns,
    ignore_index,
    kept,  # 1 - e, the bits of a double
    share,  # e / C, likewise
    A: tl.constexpr,  # dtype of the arithmetic
    KIND: tl.constexpr,
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
    them; per row a class, 4 for the loss, 12 for the statistics.
    """
    SPREADS: tl.constexpr = KIND != CLASSES
    columns = multiple(columns, VECTOR)
    kept, share = double(kept).to(A), double(share).to(A)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    end = columns
    if KIND == PROBABILITIES:
        target_row = rows_of(target, row, target_stride, TARGET_VECTOR, TARGET_BYTES)
        counts = row_inside
    else:
        y, counts = class_of(target, target_stride, row, row_inside, columns, ignore_index)
        if LOOPS:
            end = tl.max(tl.where(counts, columns, 0), 0)  # no more of rows that are ignored
    x_row = rows_of(logits, row, logits_stride, VECTOR, INPUT_BYTES)

    column = tl.arange(0, BLOCK)
    inside = row_inside[:, None] & (column < columns)[None, :]
    x = tl.load(x_row + column[None, :], mask=inside).to(A)
    m = tl.where(inside, x, float("-inf"))
    s = tl.where(m == float("-inf"), 0.0, m - m + 1.0)  # NaN for NaN and inf
    if SPREADS:
        t = target_row + column[None, :] if KIND == PROBABILITIES else None
        mass = spread_of(t, weight, column, columns, inside, kept, share, WEIGHT_BYTES)
        dot = tl.where(inside, mass * (m - origin(m)), 0.0)
    if LOOPS:
        for start in range(BLOCK, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = row_inside[:, None] & (column < columns)[None, :]
            x = tl.load(x_row + column[None, :], mask=inside).to(A)
            x = tl.where(inside, x, float("-inf"))
            # exp(x - m) or, where x is the new maximum, exp(m - x): one exponential for both.
            e = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - m)))
            rises = x > m
            s = tl.where(rises, s * e + 1.0, s + e)
            if SPREADS:
                t = target_row + column[None, :] if KIND == PROBABILITIES else None
                q = spread_of(t, weight, column, columns, inside, kept, share, WEIGHT_BYTES)
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
        x_y = tl.load(logits + row * logits_stride + y, mask=counts, other=0).to(A)
        loss += hot * (log_s - (x_y - top))
        total += hot
    tl.store(losses + row, tl.where(counts, loss, 0.0), mask=row_inside)
    tl.store(stats + 3 * row, top, mask=row_inside)
    tl.store(stats + 3 * row + 1, log_s, mask=row_inside)
    tl.store(stats + 3 * row + 2, tl.where(counts, total, 0.0), mask=row_inside)


@triton.jit(do_not_specialize=[*_ROWS, *_CLASSES, "grad_stride"])
def cross_entropy_backward_kernel(
    grad,  # [rows]
    grad_stride,
    logits,  # [rows, columns]
    logits_stride,
    target,  # [rows] classes or [rows, columns] probabilities
    target_stride,
    stats,  # [rows, 3]
    weight,  # [columns], or None
    out,  # [rows, columns], contiguous
    rows,
    columns,
    ignore_index,
    kept,  # 1 - e, the bits of a double
    share,  # e / C, likewise
    A: tl.constexpr,
    KIND: tl.constexpr,
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
    target has them; per row a class, 4 for g, 12 for the statistics.
    """
    columns = multiple(columns, VECTOR)
    kept, share = double(kept).to(A), double(share).to(A)
    row, column, inside = part_of(rows, columns, ROWS, BLOCK)
    row_inside = row < rows
    t = None
    if KIND == PROBABILITIES:
        t = rows_of(target, row, target_stride, TARGET_VECTOR, TARGET_BYTES) + column[None, :]
        counts = row_inside
    else:
        y, counts = class_of(target, target_stride, row, row_inside, columns, ignore_index)
    g = tl.load(grad + row * grad_stride, mask=row_inside).to(A)
    m = tl.load(stats + 3 * row, mask=row_inside)
    log_s = tl.load(stats + 3 * row + 1, mask=row_inside)
    mass = tl.load(stats + 3 * row + 2, mask=row_inside)
    x_row = rows_of(logits, row, logits_stride, VECTOR, INPUT_BYTES)
    x = tl.load(x_row + column[None, :], mask=inside).to(A)
    dx = mass[:, None] * tl.exp(x - m[:, None] - log_s[:, None])
    if KIND != CLASSES:
        dx -= spread_of(t, weight, column, columns, inside, kept, share, WEIGHT_BYTES)
    if KIND != PROBABILITIES:
        hot = hot_of(weight, y, counts, kept)
        dx -= tl.where(column[None, :] == y[:, None], hot[:, None], 0.0)
    dx = tl.where(counts[:, None], g[:, None] * dx, 0.0)
    tl.store(out + row[:, None] * columns + column[None, :], dx, mask=inside)


# --- Means over the elements of a sample --------------------------------------------------------


@triton.jit
def divide(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def exponential(z):
    """exp(z) for z <= 0 to a few units in the last place, denormal results included.

    tl.exp rounds z log2(e), which costs |z| / 2 units. With z = n log 2 + r, |r| <= log(2) / 2, r
    has no such error, and 2^n is exact; n stays in the normal range.
    """
    if z.dtype == tl.float64:
        return tl.exp(z)
    else:
        n = tl.maximum(tl.floor(z * 1.44269504 + 0.5), -126.0)
        n = tl.where(z == z, n, 0.0)  # not NaN, which is no integer
        r = tl.fma(n, -0.693359375, z)
        r = tl.fma(n, 2.12194440e-4, r)
        return tl.exp(r) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def softplus_of_minus(x):
    """log(1 + exp(-x)) = log1p(e) + max(-x, 0) with e = exp(-|x|), and e.

    With u the rounded 1 + e, log1p(e) is log(u) e / (u - 1): what the rounding has done to the
    logarithm it has done to u - 1.
    """
    e = exponential(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * divide(e, tl.where(u == 1.0, 1.0, u - 1.0)))
    return log1p + tl.maximum(-x, 0.0)


@triton.jit
def positive_of(weight, column, columns, t, WEIGHT_BYTES: tl.constexpr):
    """1 + (p - 1) t, [ROWS, BLOCK]; 1 without weights p [columns]."""
    if weight is None:
        return tl.full(t.shape, 1.0, t.dtype)
    else:
        p = weights_of(weight, column, columns, t.dtype, WEIGHT_BYTES)[None, :]
        return 1.0 + (p - 1.0) * t


@triton.jit(do_not_specialize=_SAMPLES)
def mean_kernel(
    input,  # [rows, columns]
    input_stride,
    target,  # [rows, columns]
    target_stride,
    weight,  # [columns], or None
    losses,  # [rows] float32
    rows,
    columns,
    A: tl.constexpr,  # dtype of the arithmetic
    BINARY: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
    INPUT_BYTES: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean over columns of (x - t)^2 or, if BINARY, of (1 - t) x + positive log(1 + exp(-x)).

    Bytes moved: input and target once, 4 a row.
    """
    columns = multiple(columns, VECTOR)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_row = rows_of(input, row, input_stride, VECTOR, INPUT_BYTES)
    t_row = rows_of(target, row, target_stride, TARGET_VECTOR, TARGET_BYTES)
    total = tl.zeros([ROWS, BLOCK], A)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(x_row + column[None, :], mask=inside, other=0).to(A)
        t = tl.load(t_row + column[None, :], mask=inside, other=0).to(A)
        if BINARY:
            positive = positive_of(weight, column, columns, t, WEIGHT_BYTES)
            loss = (1.0 - t) * x + positive * softplus_of_minus(x)
        else:
            loss = (x - t) * (x - t)
        total += tl.where(inside, loss, 0.0)
    mean = divide(tl.sum(total, 1), tl.zeros([ROWS], A) + columns.to(A))
    tl.store(losses + row, mean, mask=row < rows)


@triton.jit(do_not_specialize=[*_SAMPLES, "grad_stride"])
def mean_backward_kernel(
    grad,  # [rows]
    grad_stride,
    input,  # [rows, columns]
    input_stride,
    target,  # [rows, columns]
    target_stride,
    weight,  # [columns], or None
    out,  # [rows, columns], contiguous
    rows,
    columns,
    A: tl.constexpr,
    BINARY: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
    INPUT_BYTES: tl.constexpr,
    TARGET_BYTES: tl.constexpr,
    WEIGHT_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g / n times 2 (x - t) or, if BINARY, (1 - t) - positive sigmoid(-x).

    Bytes moved: input and target once, each element of the gradient once, 4 a row.
    """
    columns = multiple(columns, VECTOR)
    row, column, inside = part_of(rows, columns, ROWS, BLOCK)
    g = tl.load(grad + row * grad_stride, mask=row < rows, other=0).to(A)
    share = divide(g, tl.zeros([ROWS], A) + columns.to(A))[:, None]
    x_row = rows_of(input, row, input_stride, VECTOR, INPUT_BYTES)
    t_row = rows_of(target, row, target_stride, TARGET_VECTOR, TARGET_BYTES)
    x = tl.load(x_row + column[None, :], mask=inside, other=0).to(A)
    t = tl.load(t_row + column[None, :], mask=inside, other=0).to(A)
    if BINARY:
        e = exponential(-tl.abs(x))
        sigmoid = divide(tl.where(x < 0, 1.0, e), 1.0 + e)  # of -x
        positive = positive_of(weight, column, columns, t, WEIGHT_BYTES)
        dx = share * ((1.0 - t) - positive * sigmoid)
    else:
        dx = 2.0 * share * (x - t)
    tl.store(out + row[:, None] * columns + column[None, :], dx, mask=inside)
