"""The Triton kernels of the perturb room: one program for each chunk of each row.

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

# Below it a quotient by the norm would be inexact by as much as the norm: the smallest normal one.
_SMALLEST = tl.constexpr(2.0**-126)
_HEAD = tl.constexpr(4)  # triton_table.HEAD; kernels see no plain globals


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _divide(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(a):
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def _rounded(a, DTYPE: tl.constexpr):
    """From double to half through float, as torch does."""
    if DTYPE == tl.float64:
        return a.to(tl.float64)
    else:
        return a.to(tl.float32).to(DTYPE)


@triton.jit
def _chunk(records, chunk_rows, OPERANDS: tl.constexpr, CHUNK: tl.constexpr):
    """The program's record, its chunk's first element, how many elements are left from there, and
    whether it is full and aligned."""
    program = tl.program_id(0).to(tl.int64)
    record = records + tl.load(chunk_rows + program).to(tl.int64) * (_HEAD + OPERANDS)
    start = (program - tl.load(record + 1)) * CHUNK
    left = tl.load(record) - start
    return record, start, left, (left >= CHUNK) & (tl.load(record + 2) != 0)


@triton.jit
def _at(record, start, OPERAND: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Where the chunk of an operand begins."""
    pointer = tl.load(record + (_HEAD + OPERAND)).to(tl.pointer_type(DTYPE))
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _load(pointer, left, FULL: tl.constexpr, CHUNK: tl.constexpr):
    lanes = tl.arange(0, CHUNK)
    if FULL:
        return tl.load(pointer + lanes)
    else:
        return tl.load(pointer + lanes, mask=lanes < left, other=0)


@triton.jit
def _store(pointer, value, left, FULL: tl.constexpr, CHUNK: tl.constexpr):
    lanes = tl.arange(0, CHUNK)
    if FULL:
        tl.store(pointer + lanes, value)
    else:
        tl.store(pointer + lanes, value, mask=lanes < left)


@triton.jit
def _copy(
    record, start, left, FROM: tl.constexpr, TO: tl.constexpr, BITS: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bits from one operand to another; BITS is the integer of their width."""
    bits = _load(_at(record, start, FROM, BITS, FULL), left, FULL, CHUNK)
    _store(_at(record, start, TO, BITS, FULL), bits, left, FULL, CHUNK)


# --- Norm ---------------------------------------------------------------------------------------


@triton.jit
def _squares(
    record, start, left, eta, G: tl.constexpr, P: tl.constexpr, ADAPTIVE: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    g = _load(_at(record, start, 0, G, FULL), left, FULL, CHUNK).to(tl.float64)
    if ADAPTIVE:
        w = _load(_at(record, start, 1, P, FULL), left, FULL, CHUNK).to(tl.float64)
        g = (tl.abs(w) + eta) * g
    return tl.sum(g * g)


@triton.jit(do_not_specialize=["first", "eta"])
def norm_kernel(
    records,  # int64 [rows, HEAD + 1, adaptive 2]: (grads, params)
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
    record, start, left, full = _chunk(records, chunk_rows, OPERANDS, CHUNK)
    eta_ = _double(eta)
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

    A launch of its own and not the last program of the norm's: between launches the order of
    memory needs no fences, and there is no counter that an aborted launch could leave half-way.
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
    weights = _at(record, start, 0, BITS, FULL)
    bits = _load(weights, left, FULL, CHUNK)
    _store(_at(record, start, 2, BITS, FULL), bits, left, FULL, CHUNK)
    rho = _double(tl.load(record + 3))
    single = tl.load(norm)
    if (rho != 0) & (single > 0) & (single < float("inf")):
        if A == tl.float64:
            n = tl.load(wide)
        else:
            n = single
        n = tl.where(n < _SMALLEST, _SMALLEST, n).to(A)
        w = bits.to(P, bitcast=True).to(A)
        d = _load(_at(record, start, 1, G, FULL), left, FULL, CHUNK).to(A)
        if ADAPTIVE:
            t = tl.abs(w) + eta.to(A)
            d = t * _divide(t * d, n)
        else:
            d = _divide(d, n)
        climbed = _rounded(w + rho.to(A) * d, P)
        _store(weights, climbed.to(BITS, bitcast=True), left, FULL, CHUNK)


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
    record, start, left, full = _chunk(records, chunk_rows, 3, CHUNK)
    eta_ = _double(eta)
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
    record, start, left, full = _chunk(records, chunk_rows, 2, CHUNK)
    if full:
        _copy(record, start, left, 1, 0, BITS, True, CHUNK)
    else:
        _copy(record, start, left, 1, 0, BITS, False, CHUNK)


# --- Restore and update -------------------------------------------------------------------------


@triton.jit
def _is_skipped(found_inf):
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


@triton.jit
def _direction(
    g, w, grad_scale, decay, A: tl.constexpr, MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr
):
    """g / grad_scale, its sign, and the L2 term."""
    d = g.to(A)
    if grad_scale is not None:
        d = _divide(d, tl.load(grad_scale).to(A))
    if MAXIMIZE:
        d = d * -1.0  # -d would be 0 - d, which makes +0 of 0
    if DECAYS:
        d = d + decay.to(A) * w
    return d


@triton.jit
def _sgd(
    record, start, left, grad_scale, lr, momentum, share, decay, P: tl.constexpr, G: tl.constexpr,
    V: tl.constexpr, A: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, COUNTED: tl.constexpr, FULL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    w = _load(_at(record, start, 1, P, FULL), left, FULL, CHUNK).to(A)
    g = _load(_at(record, start, 2, G, FULL), left, FULL, CHUNK)
    d = _direction(g, w, grad_scale, decay, A, MAXIMIZE, DECAYS)
    if MOMENTUM:
        buffer = _at(record, start, 3, V, FULL)
        v = momentum.to(A) * _load(buffer, left, FULL, CHUNK).to(A) + share.to(A) * d
        if COUNTED:
            step = tl.load(tl.load(record + 3).to(tl.pointer_type(tl.float32)))
            v = tl.where(step == 0, d, v)
        _store(buffer, _rounded(v, V), left, FULL, CHUNK)
        if NESTEROV:
            d = d + momentum.to(A) * v
        else:
            d = v
    _store(_at(record, start, 0, P, FULL), _rounded(w - lr.to(A) * d, P), left, FULL, CHUNK)


@triton.jit(do_not_specialize=["lr", "momentum", "share", "decay"])
def restore_sgd_kernel(
    records,  # int64 [rows, HEAD + 3, momentum 4]: (params, backup, grads, momentum buffers),
    #           value: the address of the step count, if COUNTED
    chunk_rows,  # int32 [chunks]
    grad_scale,  # float32 [1] or None
    found_inf,  # float32 [1] or None
    lr: tl.int64,
    momentum: tl.int64,
    share: tl.int64,  # 1 - dampening
    decay: tl.int64,
    P: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    BITS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAYS: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """torch.optim.SGD's update of the backup: see the reference. Where found_inf is not 0 the
    weights are restored. Bytes: 20 an element (read backup, g and v, write w and v), 12 without
    momentum."""
    OPERANDS: tl.constexpr = 4 if MOMENTUM else 3
    record, start, left, full = _chunk(records, chunk_rows, OPERANDS, CHUNK)
    lr_, mu, tau, l2 = _double(lr), _double(momentum), _double(share), _double(decay)
    if _is_skipped(found_inf):
        _copy(record, start, left, 1, 0, BITS, False, CHUNK)
    elif full:
        _sgd(record, start, left, grad_scale, lr_, mu, tau, l2, P, G, V, A, MOMENTUM, NESTEROV,
             MAXIMIZE, DECAYS, COUNTED, True, CHUNK)  # fmt: skip
    else:
        _sgd(record, start, left, grad_scale, lr_, mu, tau, l2, P, G, V, A, MOMENTUM, NESTEROV,
             MAXIMIZE, DECAYS, COUNTED, False, CHUNK)  # fmt: skip


@triton.jit
def _adam(
    record, start, left, grad_scale, step_size, root, beta1, rest1, beta2, rest2, eps, decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    NEAR: tl.constexpr, MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, DECOUPLED: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = _load(_at(record, start, 1, P, FULL), left, FULL, CHUNK).to(A)
    g = _load(_at(record, start, 2, G, FULL), left, FULL, CHUNK)
    L2: tl.constexpr = DECAYS and not DECOUPLED
    d = _direction(g, w, grad_scale, decay, A, MAXIMIZE, L2)
    if DECAYS and DECOUPLED:
        w = w * decay.to(A)
    means, squares = _at(record, start, 3, M, FULL), _at(record, start, 4, V, FULL)
    old = _load(means, left, FULL, CHUNK).to(A)
    if NEAR:  # torch.lerp starts from the nearer end
        mean = old + rest1.to(A) * (d - old)
    else:
        mean = d - beta1.to(A) * (d - old)
    square = beta2.to(A) * _load(squares, left, FULL, CHUNK).to(A) + rest2.to(A) * d * d
    _store(means, _rounded(mean, M), left, FULL, CHUNK)
    _store(squares, _rounded(square, V), left, FULL, CHUNK)
    step = _divide(step_size.to(A) * mean, _divide(_root(square), root.to(A)) + eps.to(A))
    _store(_at(record, start, 0, P, FULL), _rounded(w - step, P), left, FULL, CHUNK)


@triton.jit(
    do_not_specialize=[
        *("lr", "log2_beta1", "log2_beta2", "beta1", "rest1", "beta2", "rest2", "eps", "decay"),
    ]
)
def restore_adam_kernel(
    records,  # int64 [rows, HEAD + 5]: (params, backup, grads, exp_avgs, exp_avg_sqs),
    #           value: the address of the step count
    chunk_rows,  # int32 [chunks]
    grad_scale,  # float32 [1] or None
    found_inf,  # float32 [1] or None
    lr: tl.int64,
    log2_beta1: tl.int64,
    log2_beta2: tl.int64,
    beta1: tl.int64,
    rest1: tl.int64,  # 1 - beta1
    beta2: tl.int64,
    rest2: tl.int64,  # 1 - beta2
    eps: tl.int64,
    decay: tl.int64,  # weight_decay, DECOUPLED 1 - lr * weight_decay
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    BITS: tl.constexpr,
    NEAR: tl.constexpr,  # beta1 > 0.5
    MAXIMIZE: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """torch.optim.Adam's update of the backup, AdamW's if DECOUPLED: see the reference. Where
    found_inf is not 0 the weights are restored. Bytes: 28 an element.

    beta^t = 2^(t log2 beta) in float64: with x = -t ln beta the exponent is wrong by at most 2 u x,
    so the power by 2 u x e^-x < u, u = 2^-53, which is no more than a pow of one ulp would be.
    """
    record, start, left, full = _chunk(records, chunk_rows, 5, CHUNK)
    t = tl.load(tl.load(record + 3).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
    step_size = _double(lr) / (1 - tl.exp2(t * _double(log2_beta1)))
    root = tl.sqrt(1 - tl.exp2(t * _double(log2_beta2)))
    b1, r1, b2, r2 = _double(beta1), _double(rest1), _double(beta2), _double(rest2)
    eps_, decay_ = _double(eps), _double(decay)
    if _is_skipped(found_inf):
        _copy(record, start, left, 1, 0, BITS, False, CHUNK)
    elif full:
        _adam(record, start, left, grad_scale, step_size, root, b1, r1, b2, r2, eps_, decay_, P, G,
              M, V, A, NEAR, MAXIMIZE, DECAYS, DECOUPLED, True, CHUNK)  # fmt: skip
    else:
        _adam(record, start, left, grad_scale, step_size, root, b1, r1, b2, r2, eps_, decay_, P, G,
              M, V, A, NEAR, MAXIMIZE, DECAYS, DECOUPLED, False, CHUNK)  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def count_steps_kernel(
    steps,  # int64 [count]: addresses of float32 [1]
    count: tl.int32,
    found_inf,  # float32 [1] or None
    BLOCK: tl.constexpr,
):
    """steps <- steps + 1, unless found_inf is not 0. After the update, whose programs all read
    them: between launches the order is the stream's."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    if not _is_skipped(found_inf):
        at = tl.load(steps + lanes, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(at, tl.load(at, mask=mask, other=0.0) + 1, mask=mask)
