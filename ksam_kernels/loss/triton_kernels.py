"""The Triton kernels of cross-entropy: a program has whole rows, ROWS x BLOCK elements at a time.

The formulas are those of csrc/loss/loss_row.h. triton_rows.py says where rows and tiles lie, and
what is known of addresses. Doubles are passed as their bits: see
:func:`ksam_kernels.triton_support.double_bits`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ksam_kernels.loss.triton_rows import (
    count_of,
    elements_of,
    matrix_of,
    part_of_rows,
    rows_of,
    tile_of,
    weights_of,
)
from ksam_kernels.triton_assert import check
from ksam_kernels.triton_math import double_of

#: A class without spread; a class with smoothing; probabilities (target.cuh has the same).
CLASSES, SMOOTHED, PROBABILITIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_ROWS = ["logits", "logits_stride", "target", "target_stride", "weight", "rows", "columns", "group"]
_CLASSES = ["ignore_index", "confidence", "uniform"]


# --- Target: q_c = hot [c = y] + spread_c -------------------------------------------------------


class Smoothing(NamedTuple):
    """What is done to every target, with label smoothing e and weights w."""

    confidence: tl.tensor  # 1 - e
    uniform: tl.tensor  # e / C
    weight: tl.tensor | None  # [columns]


@triton.jit
def class_of(
    target,  # [rows]
    target_stride,
    rows,
    columns,
    ignore_index,
    TRAPS: tl.constexpr,
):
    """Classes [ROWS] int64, and which of them count: those of rows that exist, not ignored."""
    y = tl.load(target + rows.number * target_stride, mask=rows.inside, other=0).to(tl.int64)
    counts = rows.inside & (y != ignore_index)
    valid = (y >= 0) & (y < columns)
    check(valid | (counts == 0), "target holds a class that is out of range", TRAPS)
    return y, counts & valid


@triton.jit
def hot_of(y, counts, smoothing):
    """(1 - e) w_y [ROWS]; 0 in rows that do not count."""
    hot = tl.where(counts, smoothing.confidence, 0.0)
    if smoothing.weight is not None:
        hot *= tl.load(smoothing.weight + y, mask=counts, other=0).to(hot.dtype)
    return hot


@triton.jit
def logit_of_class(logits, rows, y, counts, PLANES: tl.constexpr):
    """x_y [ROWS]; 0 in rows that do not count."""
    if PLANES:
        at = logits.start + rows.number + y * logits.stride
    else:
        at = logits.start + rows.number * logits.stride + y
    return tl.load(at, mask=counts, other=0)


@triton.jit
def spread_of(
    target,  # a matrix of probabilities; unused where there are classes
    tile,
    smoothing,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,  # vector_of the target
    WEIGHT_VECTOR: tl.constexpr,
    PLANES: tl.constexpr,
):
    """w_c ((1 - e) t_c + e / C) [ROWS, BLOCK], without the first term for classes; 0 outside."""
    A: tl.constexpr = smoothing.uniform.dtype
    if KIND == PROBABILITIES:
        t = tl.load(elements_of(target, tile, VECTOR, PLANES), mask=tile.inside).to(A)
        q = tl.where(tile.inside, smoothing.confidence * t + smoothing.uniform, 0.0)
    else:
        q = tl.where(tile.inside, smoothing.uniform, 0.0)
    if smoothing.weight is not None:
        q *= weights_of(smoothing.weight, tile, A, WEIGHT_VECTOR)
    return q


# --- Sums over a row ----------------------------------------------------------------------------


@triton.jit
def origin(m):
    """The number that is subtracted from x to give z. Where all x so far are -inf it is 0, so that
    z are -inf, not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_logits(logits, tile, A: tl.constexpr, VECTOR: tl.constexpr, PLANES: tl.constexpr):
    """Logits [ROWS, BLOCK]; -inf outside."""
    x = tl.load(elements_of(logits, tile, VECTOR, PLANES), mask=tile.inside).to(A)
    return tl.where(tile.inside, x, float("-inf"))


@triton.jit
def add_exp(s, m, x):
    """s = sum exp z with one x more in each lane, from the larger of m and x."""
    # exp(x - m) or, where x is the new maximum, exp(m - x): one exponential for both.
    e = tl.where(x == float("-inf"), 0.0, tl.exp(-tl.abs(x - m)))
    return tl.where(x > m, s * e + 1.0, s + e)


@triton.jit
def add_product(dot, mass, m, x, q, inside):
    """dot = sum q z, likewise. mass: the sum of q before."""
    rises = x > m
    dot += tl.where(rises, mass * (origin(m) - x), 0.0)
    z = tl.where(rises, 0.0, x - origin(m))
    return dot + tl.where(inside, q * z, 0.0)


@triton.jit
def store_stats(stats, rows, m, log_s, mass):
    """What the backward pass needs of each row."""
    at = stats + 3 * rows.number
    tl.store(at, m, mask=rows.inside)
    tl.store(at + 1, log_s, mask=rows.inside)
    tl.store(at + 2, mass, mask=rows.inside)


@triton.jit
def load_stats(stats, rows):
    """m, log s and mass [ROWS] as :func:`store_stats` stored them."""
    at = stats + 3 * rows.number
    m = tl.load(at, mask=rows.inside)
    log_s = tl.load(at + 1, mask=rows.inside)
    mass = tl.load(at + 2, mask=rows.inside)
    return m, log_s, mass


# --- Kernels ------------------------------------------------------------------------------------


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
    group: tl.int64,  # rows of a group of planes: the planes are as far apart
    ignore_index: tl.int64,
    confidence: tl.int64,  # 1 - e, the bits of a double
    uniform: tl.int64,  # e / C, likewise
    A: tl.constexpr,  # dtype of the arithmetic
    INDEX: tl.constexpr,  # and of columns
    KIND: tl.constexpr,
    PLANES: tl.constexpr,  # logits and probabilities are [groups, columns, group]
    TRAPS: tl.constexpr,  # how a class out of range fails
    VECTOR: tl.constexpr,  # vector_of the logits
    TARGET_VECTOR: tl.constexpr,  # of probabilities
    WEIGHT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPS: tl.constexpr,  # whether columns > BLOCK
):
    """loss = sum_c q_c (log s - z_c) with z_c = x_c - m, m = max x_c, s = sum exp z_c, in one pass.

    Each of ROWS x BLOCK lanes has a maximum of its own, from which its sums are measured until
    they are combined. Bytes moved: each logit once, each probability where the target has
    them; per row a class, 4 for the loss, 12 for the statistics (float64: 24).
    """
    SPREADS: tl.constexpr = KIND != CLASSES
    smoothing = Smoothing(double_of(confidence).to(A), double_of(uniform).to(A), weight)
    columns = count_of(columns, INDEX, VECTOR, PLANES)
    rows = rows_of(tl.program_id(0), rows, group, ROWS, VECTOR, PLANES)
    logits = matrix_of(logits, logits_stride, rows, group, VECTOR, PLANES)
    end = columns
    if KIND == PROBABILITIES:
        target = matrix_of(target, target_stride, rows, group, TARGET_VECTOR, PLANES)
        counts = rows.inside
    else:
        y, counts = class_of(target, target_stride, rows, columns, ignore_index, TRAPS)
        if LOOPS:
            end = tl.max(tl.where(counts, columns, 0), 0)  # no further if all rows are ignored

    tile = tile_of(rows, 0, columns, BLOCK)
    m = load_logits(logits, tile, A, VECTOR, PLANES)
    s = tl.where(m == float("-inf"), 0.0, m - m + 1.0)  # NaN for NaN and inf
    if SPREADS:
        mass = spread_of(target, tile, smoothing, KIND, TARGET_VECTOR, WEIGHT_VECTOR, PLANES)
        dot = tl.where(tile.inside, mass * (m - origin(m)), 0.0)
    if LOOPS:
        for start in range(BLOCK, end, BLOCK):
            tile = tile_of(rows, start, columns, BLOCK)
            x = load_logits(logits, tile, A, VECTOR, PLANES)
            s = add_exp(s, m, x)
            if SPREADS:
                q = spread_of(target, tile, smoothing, KIND, TARGET_VECTOR, WEIGHT_VECTOR, PLANES)
                dot = add_product(dot, mass, m, x, q, tile.inside)
                mass += q
            m = tl.where(x > m, x, m)

    top = tl.max(m, 1)
    log_s = tl.log(tl.sum(s * tl.exp(m - top[:, None]), 1))  # NaN where all are -inf
    loss, total = tl.zeros([ROWS], A), tl.zeros([ROWS], A)
    if SPREADS:
        dot += mass * (origin(m) - origin(top)[:, None])
        total = tl.sum(mass, 1)
        loss = total * log_s - tl.sum(dot, 1)
    if KIND != PROBABILITIES:
        hot = hot_of(y, counts, smoothing)
        x_y = logit_of_class(logits, rows, y, counts, PLANES).to(A)
        loss += hot * (log_s - (x_y - top))
        total += hot
    tl.store(losses + rows.number, tl.where(counts, loss, 0.0), mask=rows.inside)
    store_stats(stats, rows, top, log_s, tl.where(counts, total, 0.0))


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
    group: tl.int64,
    ignore_index: tl.int64,
    confidence: tl.int64,
    uniform: tl.int64,
    A: tl.constexpr,
    INDEX: tl.constexpr,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    TRAPS: tl.constexpr,
    VECTOR: tl.constexpr,
    TARGET_VECTOR: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx_c = g (mass p_c - q_c) with p_c = exp(x_c - m - log s); 0 in ignored rows.

    A program has one tile. Arguments are those of :func:`cross_entropy_kernel`, where it has them.
    Bytes moved: each logit once, each element of the gradient once, each probability where the
    target has them; per row a class, 4 for g, 12 for the statistics (float64: 24).
    """
    smoothing = Smoothing(double_of(confidence).to(A), double_of(uniform).to(A), weight)
    columns = count_of(columns, INDEX, VECTOR, PLANES)
    program, start = part_of_rows(columns, BLOCK)
    rows = rows_of(program, rows, group, ROWS, VECTOR, PLANES)
    tile = tile_of(rows, start, columns, BLOCK)
    logits = matrix_of(logits, logits_stride, rows, group, VECTOR, PLANES)
    out = matrix_of(out, columns * group if PLANES else columns, rows, group, VECTOR, PLANES)
    if KIND == PROBABILITIES:
        target = matrix_of(target, target_stride, rows, group, TARGET_VECTOR, PLANES)
        counts = rows.inside
    else:
        y, counts = class_of(target, target_stride, rows, columns, ignore_index, TRAPS)

    g = tl.load(grad + rows.number * grad_stride, mask=rows.inside).to(A)
    m, log_s, mass = load_stats(stats, rows)
    x = tl.load(elements_of(logits, tile, VECTOR, PLANES), mask=tile.inside).to(A)
    dx = mass[:, None] * tl.exp(x - m[:, None] - log_s[:, None])
    if KIND != CLASSES:
        dx -= spread_of(target, tile, smoothing, KIND, TARGET_VECTOR, WEIGHT_VECTOR, PLANES)
    if KIND != PROBABILITIES:
        hot = hot_of(y, counts, smoothing)
        dx -= tl.where(tile.column[None, :] == y[:, None], hot[:, None], 0.0)
    dx = tl.where(counts[:, None], g[:, None] * dx, 0.0)
    tl.store(elements_of(out, tile, VECTOR, PLANES), dx, mask=tile.inside)
