"""The Triton kernels of losses that are a mean over the elements of a sample, a row here.

The formulas are those of csrc/loss/elementwise.h; for the rest see triton_rows.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ksam_kernels.loss.triton_rows import (
    Matrix,
    elements_of,
    multiple,
    part_of_rows,
    rows_apart,
    tile_of,
    weights_of,
)
from ksam_kernels.triton_math import divide

_SAMPLES = ["input", "input_stride", "target", "target_stride", "weight", "rows", "columns"]


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

    With u the rounded 1 + e, log1p(e) is log(u) e / (u - 1): the rounding has the same effect on
    the logarithm and on u - 1.
    """
    e = exponential(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * divide(e, tl.where(u == 1.0, 1.0, u - 1.0)))
    return log1p + tl.maximum(-x, 0.0)


@triton.jit
def positive_of(weight, tile, t, VECTOR: tl.constexpr):
    """1 + (p - 1) t, [ROWS, BLOCK]; 1 without weights p [columns]."""
    if weight is None:
        return tl.full(t.shape, 1.0, t.dtype)
    else:
        p = weights_of(weight, tile, t.dtype, VECTOR)
        return 1.0 + (p - 1.0) * t


@triton.jit
def load_tile(start, stride, tile, A: tl.constexpr, VECTOR: tl.constexpr):
    """Elements [ROWS, BLOCK]; 0 outside."""
    at = elements_of(Matrix(start, stride), tile, VECTOR, False)
    return tl.load(at, mask=tile.inside, other=0).to(A)


@triton.jit(do_not_specialize=_SAMPLES)
def mean_kernel(
    input,  # [rows, columns]
    input_stride: tl.int64,
    target,  # [rows, columns]
    target_stride: tl.int64,
    weight,  # [columns], or None
    losses,  # [rows] float32
    rows: tl.int64,
    columns,
    A: tl.constexpr,  # dtype of the arithmetic
    INDEX: tl.constexpr,  # and of columns
    BINARY: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean over columns of (x - t)^2 or, if BINARY, of (1 - t) x + positive log(1 + exp(-x)).

    Bytes moved: input and target once, 4 a row.
    """
    columns = multiple(columns, VECTOR).to(INDEX)
    rows = rows_apart(tl.program_id(0), rows, ROWS)
    total = tl.zeros([ROWS, BLOCK], A)
    for start in range(0, columns, BLOCK):
        tile = tile_of(rows, start, columns, BLOCK)
        x = load_tile(input, input_stride, tile, A, VECTOR)
        t = load_tile(target, target_stride, tile, A, TARGET_VECTOR)
        if BINARY:
            positive = positive_of(weight, tile, t, WEIGHT_VECTOR)
            loss = (1.0 - t) * x + positive * softplus_of_minus(x)
        else:
            loss = (x - t) * (x - t)
        total += tl.where(tile.inside, loss, 0.0)
    mean = divide(tl.sum(total, 1), tl.zeros([ROWS], A) + columns.to(A))
    tl.store(losses + rows.number, mean, mask=rows.inside)


@triton.jit(do_not_specialize=[*_SAMPLES, "grad_stride"])
def mean_backward_kernel(
    grad,  # [rows]
    grad_stride: tl.int64,
    input,  # [rows, columns]
    input_stride: tl.int64,
    target,  # [rows, columns]
    target_stride: tl.int64,
    weight,  # [columns], or None
    out,  # [rows, columns], contiguous
    rows: tl.int64,
    columns,
    A: tl.constexpr,
    INDEX: tl.constexpr,
    BINARY: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g / n times 2 (x - t) or, if BINARY, (1 - t) - positive sigmoid(-x).

    Bytes moved: input and target once, each element of the gradient once, 4 a row.
    """
    columns = multiple(columns, VECTOR).to(INDEX)
    program, start = part_of_rows(columns, BLOCK)
    rows = rows_apart(program, rows, ROWS)
    tile = tile_of(rows, start, columns, BLOCK)
    g = tl.load(grad + rows.number * grad_stride, mask=rows.inside, other=0).to(A)
    element_grad = divide(g, tl.zeros([ROWS], A) + columns.to(A))[:, None]
    x = load_tile(input, input_stride, tile, A, VECTOR)
    t = load_tile(target, target_stride, tile, A, TARGET_VECTOR)
    if BINARY:
        e = exponential(-tl.abs(x))
        sigmoid = divide(tl.where(x < 0, 1.0, e), 1.0 + e)  # of -x
        positive = positive_of(weight, tile, t, WEIGHT_VECTOR)
        dx = element_grad * ((1.0 - t) - positive * sigmoid)
    else:
        dx = 2.0 * element_grad * (x - t)
    tl.store(elements_of(Matrix(out, columns), tile, VECTOR, False), dx, mask=tile.inside)
