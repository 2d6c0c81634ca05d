"""The Triton kernels that restore the weights and update them: SGD, Adam, and their step counts.

Formulas, records and chunks are as in :mod:`ksam_kernels.perturb.triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ksam_kernels.perturb.triton_kernels import (
    chunk_of,
    copy_chunk,
    load_chunk,
    operand_at,
    rounded,
    store_chunk,
)
from ksam_kernels.triton_math import divide, double_of


@triton.jit
def _root(a):
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def _is_skipped(found_inf):
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


@triton.jit
def _rate(lr, device_lr):
    if device_lr is None:
        return double_of(lr)
    else:
        return tl.load(device_lr).to(tl.float64)


@triton.jit
def _direction(
    g, w, grad_scale, decay, A: tl.constexpr, MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr
):
    """g / grad_scale, its sign, and the L2 term."""
    d = g.to(A)
    if grad_scale is not None:
        d = divide(d, tl.load(grad_scale).to(A))
    if MAXIMIZE:
        d = d * -1.0  # -d would be 0 - d, which makes +0 of 0
    if DECAYS:
        d = d + decay.to(A) * w
    return d


@triton.jit
def _sgd(
    record, start, left, grad_scale, lr, momentum, undampened, decay, P: tl.constexpr,
    G: tl.constexpr, V: tl.constexpr, A: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, COUNTED: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = load_chunk(operand_at(record, start, 1, P, FULL), left, FULL, CHUNK).to(A)
    g = load_chunk(operand_at(record, start, 2, G, FULL), left, FULL, CHUNK)
    d = _direction(g, w, grad_scale, decay, A, MAXIMIZE, DECAYS)
    if MOMENTUM:
        buffer = operand_at(record, start, 3, V, FULL)
        v = momentum.to(A) * load_chunk(buffer, left, FULL, CHUNK).to(A) + undampened.to(A) * d
        if COUNTED:
            step = tl.load(tl.load(record + 3).to(tl.pointer_type(tl.float32)))
            v = tl.where(step == 0, d, v)
        store_chunk(buffer, rounded(v, V), left, FULL, CHUNK)
        if NESTEROV:
            d = d + momentum.to(A) * v
        else:
            d = v
    store_chunk(
        operand_at(record, start, 0, P, FULL), rounded(w - lr.to(A) * d, P), left, FULL, CHUNK
    )


@triton.jit(do_not_specialize=["lr", "momentum", "undampened", "decay"])
def restore_sgd_kernel(
    records,  # int64 [rows, HEAD + 3], [rows, HEAD + 4] if MOMENTUM: (params, backup, grads,
    #           momentum buffers), value: the address of the step count, if COUNTED
    chunk_rows,  # int32 [chunks]
    device_lr,  # float32 [1], in place of lr, or None
    grad_scale,  # float32 [1] or None
    found_inf,  # float32 [1] or None
    lr: tl.int64,
    momentum: tl.int64,
    undampened: tl.int64,  # 1 - dampening
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
    record, start, left, full = chunk_of(records, chunk_rows, OPERANDS, CHUNK)
    lr_, momentum_ = _rate(lr, device_lr), double_of(momentum)
    undampened_, decay_ = double_of(undampened), double_of(decay)
    if _is_skipped(found_inf):
        copy_chunk(record, start, left, 1, 0, BITS, False, CHUNK)
    elif full:
        _sgd(record, start, left, grad_scale, lr_, momentum_, undampened_, decay_, P, G, V, A,
             MOMENTUM, NESTEROV, MAXIMIZE, DECAYS, COUNTED, True, CHUNK)  # fmt: skip
    else:
        _sgd(record, start, left, grad_scale, lr_, momentum_, undampened_, decay_, P, G, V, A,
             MOMENTUM, NESTEROV, MAXIMIZE, DECAYS, COUNTED, False, CHUNK)  # fmt: skip


@triton.jit
def _adam(
    record, start, left, grad_scale, step_size, root, beta1, rest1, beta2, rest2, eps, decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
    NEAR: tl.constexpr, MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, DECOUPLED: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    w = load_chunk(operand_at(record, start, 1, P, FULL), left, FULL, CHUNK).to(A)
    g = load_chunk(operand_at(record, start, 2, G, FULL), left, FULL, CHUNK)
    L2: tl.constexpr = DECAYS and not DECOUPLED
    d = _direction(g, w, grad_scale, decay, A, MAXIMIZE, L2)
    if DECAYS and DECOUPLED:
        w = w * decay.to(A)
    means, squares = operand_at(record, start, 3, M, FULL), operand_at(record, start, 4, V, FULL)
    old = load_chunk(means, left, FULL, CHUNK).to(A)
    if NEAR:  # torch.lerp starts from the nearer end
        mean = old + rest1.to(A) * (d - old)
    else:
        mean = d - beta1.to(A) * (d - old)
    square = beta2.to(A) * load_chunk(squares, left, FULL, CHUNK).to(A) + rest2.to(A) * d * d
    store_chunk(means, rounded(mean, M), left, FULL, CHUNK)
    store_chunk(squares, rounded(square, V), left, FULL, CHUNK)
    step = divide(step_size.to(A) * mean, divide(_root(square), root.to(A)) + eps.to(A))
    store_chunk(operand_at(record, start, 0, P, FULL), rounded(w - step, P), left, FULL, CHUNK)


@triton.jit(
    do_not_specialize=[
        *("lr", "log2_beta1", "log2_beta2", "beta1", "rest1", "beta2", "rest2", "eps", "decay"),
    ]
)
def restore_adam_kernel(
    records,  # int64 [rows, HEAD + 5]: (params, backup, grads, exp_avgs, exp_avg_sqs),
    #           value: the address of the step count
    chunk_rows,  # int32 [chunks]
    device_lr,  # float32 [1], in place of lr, or None
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
    decay: tl.int64,
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
    record, start, left, full = chunk_of(records, chunk_rows, 5, CHUNK)
    t = tl.load(tl.load(record + 3).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
    lr_ = _rate(lr, device_lr)
    step_size = lr_ / (1 - tl.exp2(t * double_of(log2_beta1)))
    root = tl.sqrt(1 - tl.exp2(t * double_of(log2_beta2)))
    b1, r1, b2, r2 = double_of(beta1), double_of(rest1), double_of(beta2), double_of(rest2)
    eps_, decay_ = double_of(eps), double_of(decay)
    if DECOUPLED:
        decay_ = 1 - lr_ * decay_
    if _is_skipped(found_inf):
        copy_chunk(record, start, left, 1, 0, BITS, False, CHUNK)
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
    """steps <- steps + 1, unless found_inf is not 0. Launched after the update, whose programs all
    read them: the stream keeps launches in order."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    if not _is_skipped(found_inf):
        at = tl.load(steps + lanes, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(at, tl.load(at, mask=mask, other=0.0) + 1, mask=mask)
