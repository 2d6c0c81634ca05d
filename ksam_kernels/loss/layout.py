"""How inputs of the losses lie in memory: classes side by side, or apart as in planes of
``[B, C, H, W]``; elements of samples in another order, as ``channels_last`` has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def classes_apart(logits: Tensor) -> bool:
    """Whether logits ``[..., C]`` have their classes apart, as ``movedim(1, -1)`` leaves them."""
    return logits.shape[-1] > 1 and logits.stride(-1) != 1


def gradient_like(logits: Tensor) -> Tensor:
    """Memory for the gradient of logits ``[..., C]``: contiguous, or where the classes lie apart in
    the layout of the logits, so that whoever made them finds it as it left them."""
    return torch.empty_like(logits) if classes_apart(logits) else logits.new_empty(logits.shape)


def in_memory_order(samples: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Tensors ``[B, ...]``, contiguous, their trailing dimensions in the order that those of the
    first have in memory: of which this is a view, and of others a copy if they need one, so that
    the backward pass need not make it again. All as they are where the first would need one."""
    if samples.is_contiguous():
        return samples, *(x.contiguous() for x in others)
    order = 0, *sorted(range(1, samples.dim()), key=samples.stride, reverse=True)
    if not samples.permute(order).is_contiguous():
        return samples, *others
    return tuple(x.permute(order).contiguous() for x in (samples, *others))


def planes_of(x: Tensor) -> Tensor | None:
    """``[..., C]`` as ``[groups, C, group]``, a view whose last two dimensions are contiguous: rows
    that lie side by side in planes. None where they do not, or where so few do that a copy is
    sooner made."""
    outer, group = x.dim() - 1, 1
    while outer > 0 and (x.shape[outer - 1] == 1 or x.stride(outer - 1) == group):
        outer, group = outer - 1, group * x.shape[outer - 1]
    if group < 16 or x.stride(-1) != group:
        return None
    groups = math.prod(x.shape[:outer])
    try:
        return x.movedim(-1, outer).view(groups, x.shape[-1], group)
    except RuntimeError:  # no common stride
        return None


def as_gradient(dx: Tensor, logits: Tensor) -> Tensor:
    """Contiguous gradients ``[N, C]`` or ``[..., C]``, in the dtype and layout they shall have."""
    dx = dx.to(logits.dtype).reshape(logits.shape)
    return gradient_like(logits).copy_(dx) if classes_apart(logits) else dx
