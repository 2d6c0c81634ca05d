"""Per-sample losses in plain PyTorch: the contract that every backend is tested against.

Arithmetic is float32 (float64 for float64 input) and the losses are float32, whatever the dtype of
the logits: bfloat16 losses collapse onto a few hundred values and misrank the samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.checks import opmath_dtype
from ksam_kernels.loss.layout import as_gradient
from ksam_kernels.topk import reference as topk_reference


def _rows(logits: Tensor) -> Tensor:
    """[..., C] -> [N, C] in the dtype of the arithmetic, contiguous: torch adds up what lies apart
    in another order."""
    rows = logits.reshape(-1, logits.shape[-1]).to(opmath_dtype(logits.dtype))
    return rows.contiguous()


def _hard_targets(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Class indices [N, 1] (0 in ignored rows, so that gathering them is safe), ignored [N]."""
    target = target.reshape(-1).long()
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    # Other devices assert in the gather kernel; asking them here would wait for the device.
    if target.device.type == "cpu":
        bad = (target < 0) | (target >= classes)
        if bool(bad.any()):
            raise IndexError(
                f"target holds class {int(target[bad][0])}, out of range for {classes} classes"
            )
    return target.unsqueeze(1), ignored


def _soft_targets(target: Tensor, weight: Tensor | None, smoothing: float, like: Tensor) -> Tensor:
    """q_c = w_c * ((1 - e) * t_c + e / C), [N, C]."""
    q = target.reshape(like.shape).to(like.dtype) * (1 - smoothing) + smoothing / like.shape[1]
    return q if weight is None else q * weight


@implements("reference", "cross_entropy")
def cross_entropy(
    logits: Tensor,  # [..., C]
    target: Tensor,  # [...] class indices, or [..., C] probabilities
    weight: Tensor | None,  # [C]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Losses [...] float32, and row statistics [..., 3] (m, log s, mass) for the backward pass.

    With m = max_c x_c and s = sum_c exp(x_c - m), -log p_c = log s - (x_c - m). Subtracting m first
    keeps the digits that ``logsumexp(x) - x_c`` loses when the logits share a large offset.
    mass = sum_c q_c is the total weight of the row's target.
    """
    x = _rows(logits)
    w = None if weight is None else weight.to(x.dtype)
    m = x.amax(dim=1, keepdim=True)
    z = x - m
    log_s = z.exp().sum(dim=1, keepdim=True).log()
    if target.is_floating_point():
        q = _soft_targets(target, w, label_smoothing, x)
        losses = (q * (log_s - z)).sum(dim=1)
        mass = q.sum(dim=1)
    else:
        y, ignored = _hard_targets(target, x.shape[1], ignore_index)
        mass = torch.ones_like(log_s[:, 0]) if w is None else w[y[:, 0]]
        losses = mass * (log_s - z.gather(1, y))[:, 0]
        if label_smoothing > 0:
            uniform = label_smoothing / x.shape[1]
            rest = log_s - z if w is None else (log_s - z) * w
            losses = (1 - label_smoothing) * losses + (uniform * rest).sum(dim=1)
            total = x.shape[1] if w is None else w.sum()
            mass = (1 - label_smoothing) * mass + uniform * total
        losses = losses.masked_fill(ignored, 0)
        mass = mass.masked_fill(ignored, 0)
    shape = logits.shape[:-1]
    out = logits.new_empty(shape, dtype=torch.float32)  # no view: autograd lets nobody modify one
    out.view(-1).copy_(losses)
    stats = torch.stack([m[:, 0], log_s[:, 0], mass], dim=1)
    return out, stats.reshape(*shape, 3)


@implements("reference", "cross_entropy_backward")
def cross_entropy_backward(
    grad: Tensor,  # [...] float32
    logits: Tensor,  # [..., C]
    target: Tensor,  # [...] or [..., C]
    stats: Tensor,  # [..., 3]
    weight: Tensor | None,  # [C]
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """d loss / d x_c = g * (mass * p_c - q_c), in the dtype of the logits; 0 in ignored rows."""
    x = _rows(logits)
    w = None if weight is None else weight.to(x.dtype)
    m, log_s, mass = stats.reshape(-1, 3).unsqueeze(2).unbind(1)
    p = (x - m - log_s).exp()
    g = grad.reshape(-1, 1).to(x.dtype)
    if target.is_floating_point():
        dx = g * (mass * p - _soft_targets(target, w, label_smoothing, x))
    else:
        y, ignored = _hard_targets(target, x.shape[1], ignore_index)
        q = torch.zeros_like(x)
        if label_smoothing > 0:
            q += label_smoothing / x.shape[1] * (1.0 if w is None else w)
        w_y = torch.ones_like(mass) if w is None else w[y]
        q.scatter_add_(1, y, (1 - label_smoothing) * w_y)
        dx = (g * (mass * p - q)).masked_fill(ignored.unsqueeze(1), 0)
    return as_gradient(dx, logits)


@implements("reference", "select_cross_entropy")
def select_cross_entropy(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B] or [B, C]
    k: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], row statistics [B, 3], and the indices [k] of the k largest losses."""
    losses, stats = cross_entropy(logits, target, weight, ignore_index, label_smoothing)
    return losses, stats, topk_reference.topk_indices(losses, k)


def mean_per_sample(elements: Tensor) -> Tensor:
    """[B, ...] -> [B] float32."""
    per_sample = math.prod(elements.shape[1:])  # not -1, which has no value in an empty batch
    return elements.reshape(elements.shape[0], per_sample).mean(dim=1).float()


def _grad_per_element(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the mean over trailing dimensions: g_b / n, shaped to broadcast."""
    per_sample = max(like[:1].numel(), 1)
    scaled = grad.to(opmath_dtype(like.dtype)) / per_sample
    return scaled.reshape(-1, *[1] * (like.dim() - 1))


@implements("reference", "binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    logits: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    pos_weight: Tensor | None,  # broadcasts to the trailing dimensions
) -> Tensor:
    """mean over trailing of (1 - t) x + (1 + (p - 1) t) * softplus(-x), float32 [B].

    softplus(-x) = log1p(exp(-|x|)) + max(-x, 0) never overflows.
    """
    dtype = opmath_dtype(logits.dtype)
    x, t = logits.to(dtype), target.to(dtype)
    softplus = torch.log1p(torch.exp(-x.abs())) + (-x).clamp_min(0)
    positive = 1.0 if pos_weight is None else 1 + (pos_weight.to(dtype) - 1) * t
    return mean_per_sample((1 - t) * x + positive * softplus)


@implements("reference", "binary_cross_entropy_with_logits_backward")
def binary_cross_entropy_with_logits_backward(
    grad: Tensor,  # [B] float32
    logits: Tensor,
    target: Tensor,
    pos_weight: Tensor | None,
) -> Tensor:
    """g / n * ((1 - t) - (1 + (p - 1) t) * sigmoid(-x)), in the dtype of the logits."""
    dtype = opmath_dtype(logits.dtype)
    x, t = logits.to(dtype), target.to(dtype)
    positive = 1.0 if pos_weight is None else 1 + (pos_weight.to(dtype) - 1) * t
    dx = _grad_per_element(grad, logits) * ((1 - t) - positive * torch.sigmoid(-x))
    return dx.to(logits.dtype).contiguous()


@implements("reference", "mse")
def mse(
    pred: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
) -> Tensor:
    """mean over trailing of (pred - target)^2, float32 [B]."""
    dtype = opmath_dtype(pred.dtype)
    return mean_per_sample((pred.to(dtype) - target.to(dtype)).square())


@implements("reference", "mse_backward")
def mse_backward(
    grad: Tensor,  # [B] float32
    pred: Tensor,
    target: Tensor,
) -> Tensor:
    """g / n * 2 (pred - target), in the dtype of pred."""
    dtype = opmath_dtype(pred.dtype)
    dx = _grad_per_element(grad, pred) * 2 * (pred.to(dtype) - target.to(dtype))
    return dx.to(pred.dtype).contiguous()
