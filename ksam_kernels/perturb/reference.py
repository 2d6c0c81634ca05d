"""Norm, perturbation, restore and update in plain PyTorch: the contract of every backend.

Each formula is written in the order in which it is rounded, with no fused multiply-add, so that it
says what an element's new bits are. Arithmetic is float32 (float64 for float64 parameters) and each
result is rounded once, to the dtype it is stored in. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ksam_kernels.backends import implements
from ksam_kernels.bits import as_bits
from ksam_kernels.checks import opmath_dtype

_ROW = 4096  # below the size from which PyTorch splits one sum over threads


def devices_of(args: Sequence[Any]) -> set[torch.device]:
    """The devices of the tensors in an operator's lists. If there are several, as for a model that
    is spread over devices, other backends leave the call to this one."""
    return {
        item.device
        for arg in args
        if isinstance(arg, list)
        for item in arg
        if isinstance(item, Tensor)
    }


def _ordered_sum(x: Tensor) -> Tensor:
    """The sum of a tensor, added in an order that no number of threads changes."""
    x = x.reshape(-1)
    while x.numel() != 1:
        x = pad(x, (0, -x.numel() % _ROW or _ROW * (x.numel() == 0)))
        x = x.reshape(-1, _ROW).sum(dim=1)
    return x[0]


def global_norm(
    grads: list[Tensor],
    params: list[Tensor],  # empty: T = 1
    eta: float,
    dtype: torch.dtype,
) -> Tensor:
    """sqrt(sum (T g)^2) with T = |w| + eta, a scalar of ``dtype``, on the first tensor's device; on
    the CPU if there are no tensors, whatever the default device.

    In float64 no square of a float32 value leaves the range. In float32, for devices that have
    nothing wider, every element is divided by the largest one first.
    """
    if not grads:
        return torch.zeros((), dtype=dtype, device="cpu")
    device = grads[0].device
    scaled = [g.to(dtype) for g in grads if g.numel() > 0]
    if params:
        weights = [p.to(dtype).abs() + eta for p in params if p.numel() > 0]
        scaled = [t * g for t, g in zip(weights, scaled, strict=True)]
    peak = torch.ones((), dtype=dtype, device=device)
    if dtype == torch.float32 and scaled:
        peak = torch.stack([x.abs().amax().to(device) for x in scaled]).amax()
        # Dividing by 0, inf or NaN would make NaN of elements that are right as they are.
        peak = torch.where((peak > 0) & peak.isfinite(), peak, 1.0)
        scaled = [x / peak.to(x.device) for x in scaled]
    parts = [_ordered_sum(x.square()).to(device) for x in scaled]
    total = _ordered_sum(torch.stack(parts)) if parts else torch.zeros_like(peak)
    return peak * total.sqrt()


def _norm_dtype(tensors: list[Tensor]) -> torch.dtype:
    on_mps = any(tensor.device.type == "mps" for tensor in tensors)
    return torch.float32 if on_mps else torch.float64


@implements("reference", "grad_norm")
def grad_norm(grads: list[Tensor], params: list[Tensor], adaptive: bool, eta: float) -> Tensor:
    """One L2 norm over all gradients (adaptive: of T g), float32 scalar."""
    return global_norm(grads, params if adaptive else [], eta, _norm_dtype(grads)).float()


@implements("reference", "perturb_")
def perturb_(
    params: list[Tensor],
    grads: list[Tensor],
    backup: list[Tensor],
    rho: list[float],  # one per parameter
    adaptive: bool,
    eta: float,
) -> Tensor:
    """backup <- w;  w <- w + rho * (g / n), adaptive w + rho * (T * (T g / n));  returns the norm.

    n is the norm, but at least the smallest normal float32: below it a quotient would be as inexact
    as the norm itself; this way the weights only move less. A norm of 0, inf or NaN leaves the
    weights as they are. If anything raises, they are what they were.
    """
    for p, b in zip(params, backup, strict=True):
        as_bits(b).copy_(as_bits(p))
    wide = global_norm(grads, params if adaptive else [], eta, _norm_dtype(grads))
    norm = wide.float()
    moves = norm.isfinite() & (norm > 0)
    try:
        for p, g, r in zip(params, grads, rho, strict=True):
            if r == 0:  # w + 0 * d would turn -0 into +0
                continue
            dtype = opmath_dtype(p.dtype)
            n = (wide if dtype == torch.float64 else norm).to(p.device)
            n = n.clamp_min(torch.finfo(torch.float32).tiny)
            w, d = p.to(dtype), g.to(dtype)
            if adaptive:
                t = w.abs() + eta
                d = t * (t * d / n)
            else:
                d = d / n
            p.copy_(torch.where(moves.to(p.device), (w + r * d).to(p.dtype), p))
    except BaseException:
        restore_(params, backup)
        raise
    return norm


@implements("reference", "restore_")
def restore_(params: list[Tensor], backup: list[Tensor]) -> None:
    """w <- backup, as bits."""
    for p, b in zip(params, backup, strict=True):
        as_bits(p).copy_(as_bits(b))


@contextmanager
def restoring(params: list[Tensor], backup: list[Tensor]) -> Iterator[None]:
    """Kernels within restore the weights; if there is no memory to load them, plain copies do.

    After a step that failed for want of memory, its activations may still be held; a copy needs no
    memory. Triton's errors have no class of their own.
    """
    try:
        yield
    except RuntimeError as error:  # as torch.OutOfMemoryError is
        if "out of memory" not in str(error):
            raise
        with torch.no_grad():
            restore_(params, backup)


def _store(target: Tensor, value: Tensor, kept: Tensor, found_inf: Tensor | None) -> None:
    """target <- value, rounded to its dtype; the bits of ``kept`` where found_inf is not zero."""
    value = value.to(target.dtype)
    if found_inf is not None:
        value = torch.where(found_inf.to(target.device).reshape(()) != 0, kept, value)
    target.copy_(value)


def _rate(lr: float, device_lr: Tensor | None, like: Tensor) -> float | Tensor:
    """The number, or in its place the tensor, as a scalar of the device and dtype of ``like``."""
    return lr if device_lr is None else device_lr.to(like.device, like.dtype).reshape(())


def _gradient(g: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    g = g.to(dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(g.device, dtype).reshape(())
    return -g if maximize else g


@implements("reference", "restore_sgd_")
def restore_sgd_(
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],  # empty without momentum
    steps: list[Tensor],  # one float32 element each, or empty: the buffers are history
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    device_lr: Tensor | None,  # one float32 element, in place of lr
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """torch.optim.SGD's update of the backed-up weights.

    d = g + weight_decay * w;  v <- momentum * v + (1 - dampening) * d, or d in the first step;
    d = d + momentum * v with nesterov, else v;  w <- w - lr * d.
    """
    for i, (p, b, g) in enumerate(zip(params, backup, grads, strict=True)):
        dtype = opmath_dtype(p.dtype)
        w = b.to(dtype)
        d = _gradient(g, dtype, grad_scale, maximize)
        if weight_decay != 0:
            d = d + weight_decay * w
        if momentum != 0:
            buffer = momentum_buffers[i]
            v = momentum * buffer.to(dtype) + (1 - dampening) * d
            if steps:
                v = torch.where(steps[i].reshape(()) == 0, d, v)
            d = d + momentum * v if nesterov else v
            _store(buffer, v, buffer, found_inf)
        _store(p, w - _rate(lr, device_lr, w) * d, b, found_inf)
        if steps:
            _store(steps[i], steps[i] + 1, steps[i], found_inf)


@implements("reference", "restore_adam_")
def restore_adam_(
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],  # one float32 element each
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    decoupled_weight_decay: bool,
    device_lr: Tensor | None,  # one float32 element, in place of lr
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """torch.optim.Adam's update of the backed-up weights, AdamW's if the decay is decoupled.

    t = steps + 1;  w = (1 - lr * weight_decay) * w, or g = g + weight_decay * w;
    m <- m + (1 - beta1) * (g - m);  v <- beta2 * v + (1 - beta2) * g * g;
    w <- w - (lr / (1 - beta1^t) * m) / (sqrt(v) / sqrt(1 - beta2^t) + eps).
    The powers are float64 where the device has it. The root of v is the nearest float, from which
    PyTorch's on a CPU may be one away.
    """
    for p, b, g, m, v, step in zip(
        params, backup, grads, exp_avgs, exp_avg_sqs, steps, strict=True
    ):
        dtype = opmath_dtype(p.dtype)
        t = step.to(_norm_dtype([p])).reshape(()) + 1
        rate = _rate(lr, device_lr, t)
        step_size = (rate / (1 - beta1**t)).to(dtype)
        root = (1 - beta2**t).sqrt().to(dtype)
        w = b.to(dtype)
        d = _gradient(g, dtype, grad_scale, maximize)
        if weight_decay != 0:
            if decoupled_weight_decay:
                kept = 1 - rate * weight_decay
                w = w * (kept.to(dtype) if isinstance(kept, Tensor) else kept)
            else:
                d = d + weight_decay * w
        old = m.to(dtype)
        # torch.lerp starts from the nearer end.
        mean = old + (1 - beta1) * (d - old) if beta1 > 0.5 else d - beta1 * (d - old)
        square = beta2 * v.to(dtype) + (1 - beta2) * d * d
        new = w - (step_size * mean) / (square.sqrt() / root + eps)
        _store(m, mean, m, found_inf)
        _store(v, square, v, found_inf)
        _store(p, new, b, found_inf)
        _store(step, step + 1, step, found_inf)
