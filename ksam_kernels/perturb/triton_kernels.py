"""The Triton kernels for norm, perturbation and restore: one program for each chunk of each row.

Those that restore and update in one are in :mod:`ksam_kernels.perturb.triton_updates`.

Formulas are those of the reference, in its order. Nothing is contracted (the launches say so),
float32 division and square root are IEEE's by name, and results are rounded once. ``records`` and
``chunk_rows`` are those of :mod:`ksam_kernels.perturb.triton_table`. Doubles come as their bits:
see :func:`ksam_kernels.triton_support.double_bits`.

A chunk that is full and aligned is moved in vectors of 16 bytes, any other one element by element:
its mask would be known lane by lane only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ksam_kernels.triton_math import divide, double_of

# The smallest normal float32: below it a quotient by the norm would be as inexact as the norm.
_SMALLEST = tl.constexpr(2.0**-126)
_HEAD = tl.constexpr(4)  # triton_table.HEAD; kernels see no plain globals


@triton.jit
def rounded(a, DTYPE: tl.constexpr):
    """The value in another dtype: from double to half through float, as torch does."""
    if DTYPE == tl.float64:
        return a.to(tl.float64)
    else:
        return a.to(tl.float32).to(DTYPE)


@triton.jit
def chunk_of(records, chunk_rows, OPERANDS: tl.constexpr, CHUNK: tl.constexpr):
    """The program's record, its chunk's first element, how many elements are left from there, and
    whether it is full and aligned."""
    program = tl.program_id(0).to(tl.int64)
    record = records + tl.load(chunk_rows + program).to(tl.int64) * (_HEAD + OPERANDS)
    start = (program - tl.load(record + 1)) * CHUNK
    left = tl.load(record) - start
    return record, start, left, (left >= CHUNK) & (tl.load(record + 2) != 0)


@triton.jit
def operand_at(record, start, OPERAND: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Where the chunk of an operand begins."""
    pointer = tl.load(record + (_HEAD + OPERAND)).to(tl.pointer_type(DTYPE))
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def load_chunk(pointer, left, FULL: tl.constexpr, CHUNK: tl.constexpr):
    lanes = tl.arange(0, CHUNK)
    if FULL:
        return tl.load(pointer + lanes)
    else:
        return tl.load(pointer + lanes, mask=lanes < left, other=0)


@triton.jit
def store_chunk(pointer, value, left, FULL: tl.constexpr, CHUNK: tl.constexpr):
    lanes = tl.arange(0, CHUNK)
    if FULL:
        tl.store(pointer + lanes, value)
    else:
        tl.store(pointer + lanes, value, mask=lanes < left)


@triton.jit
def copy_chunk(
    record, start, left, FROM: tl.constexpr, TO: tl.constexpr, BITS: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bits from one operand to another; BITS is the integer of their width."""
    bits = load_chunk(operand_at(record, start, FROM, BITS, FULL), left, FULL, CHUNK)
    store_chunk(operand_at(record, start, TO, BITS, FULL), bits, left, FULL, CHUNK)


# --- Norm ---------------------------------------------------------------------------------------


@triton.jit
def _squares(
    record, start, left, eta, G: tl.constexpr, P: tl.constexpr, ADAPTIVE: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    g = load_chunk(operand_at(record, start, 0, G, FULL), left, FULL, CHUNK).to(tl.float64)
    if ADAPTIVE:
        w = load_chunk(operand_at(record, start, 1, P, FULL), left, FULL, CHUNK).to(tl.float64)
        g = (tl.abs(w) + eta) * g
    return tl.sum(g * g)


@triton.jit(do_not_specialize=["first", "eta"])
def norm_kernel(
    records,  # int64 [rows, HEAD + 1], [rows, HEAD + 2] if ADAPTIVE: (grads, params)
    chunk_rows,  # int32 [chunks]
    partials,  # float64, the sums of the chunks from ``first`` on are written
    first: tl.int64,
    eta: tl.int64,
    G: tl.constexpr,
    P: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """sum (T g)^2 of a chunk, in float64. Bytes: 4 an element, adaptive 8."""
    OPERANDS: tl.constexpr = 2 if ADAPTIVE else 1
    record, start, left, full = chunk_of(records, chunk_rows, OPERANDS, CHUNK)
    eta_ = double_of(eta)
    if full:
        total = _squares(record, start, left, eta_, G, P, ADAPTIVE, True, CHUNK)
    else:
        total = _squares(record, start, left, eta_, G, P, ADAPTIVE, False, CHUNK)
    tl.store(partials + first.to(tl.int64) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["count"])
def finish_norm_kernel(
    partials,  # float64 [count]
    count: tl.int32,
    wide,  # float64 [1]
    norm,  # float32 [1]
    BLOCK: tl.constexpr,
):
    """sqrt(sum of the chunks' sums), added in the same order in every run. One program.

    A launch of its own and not the last program of the norm's: between launches memory is ordered
    without fences, and there is no counter that an aborted launch could leave half-way.
    """
    totals = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        totals += tl.load(partials + lanes, mask=lanes < count, other=0.0)
    root = tl.sqrt(tl.sum(totals))
    tl.store(wide, root)
    tl.store(norm, root.to(tl.float32))


# --- Perturb and restore ------------------------------------------------------------------------


@triton.jit
def _climb(
    record, start, left, norm, wide, eta, P: tl.constexpr, G: tl.constexpr, A: tl.constexpr,
    BITS: tl.constexpr, ADAPTIVE: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    weights = operand_at(record, start, 0, BITS, FULL)
    bits = load_chunk(weights, left, FULL, CHUNK)
    store_chunk(operand_at(record, start, 2, BITS, FULL), bits, left, FULL, CHUNK)
    rho = double_of(tl.load(record + 3))
    single = tl.load(norm)
    if (rho != 0) & (single > 0) & (single < float("inf")):
        if A == tl.float64:
            n = tl.load(wide)
        else:
            n = single
        n = tl.where(n < _SMALLEST, _SMALLEST, n).to(A)
        w = bits.to(P, bitcast=True).to(A)
        d = load_chunk(operand_at(record, start, 1, G, FULL), left, FULL, CHUNK).to(A)
        if ADAPTIVE:
            t = tl.abs(w) + eta.to(A)
            d = t * divide(t * d, n)
        else:
            d = divide(d, n)
        climbed = rounded(w + rho.to(A) * d, P)
        store_chunk(weights, climbed.to(BITS, bitcast=True), left, FULL, CHUNK)


@triton.jit(do_not_specialize=["eta"])
def perturb_kernel(
    records,  # int64 [rows, HEAD + 3]: (params, grads, backup), value: the bits of rho
    chunk_rows,  # int32 [chunks]
    norm,  # float32 [1]
    wide,  # float64 [1], the same unrounded
    eta: tl.int64,
    P: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,  # dtype of the arithmetic
    BITS: tl.constexpr,  # integer of P's width
    ADAPTIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """backup <- w;  w <- w + rho * (g / n), adaptive w + rho * (T * (T g / n)), T = |w| + eta.

    Bytes: 16 an element (read w and g, write w and backup).
    """
    record, start, left, full = chunk_of(records, chunk_rows, 3, CHUNK)
    eta_ = double_of(eta)
    if full:
        _climb(record, start, left, norm, wide, eta_, P, G, A, BITS, ADAPTIVE, True, CHUNK)
    else:
        _climb(record, start, left, norm, wide, eta_, P, G, A, BITS, ADAPTIVE, False, CHUNK)


@triton.jit
def restore_kernel(
    records,  # int64 [rows, HEAD + 2]: (params, backup)
    chunk_rows,  # int32 [chunks]
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """w <- backup. Bytes: 8 an element."""
    record, start, left, full = chunk_of(records, chunk_rows, 2, CHUNK)
    if full:
        copy_chunk(record, start, left, 1, 0, BITS, True, CHUNK)
    else:
        copy_chunk(record, start, left, 1, 0, BITS, False, CHUNK)
