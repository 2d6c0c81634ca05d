"""How inputs of the losses lie in memory: classes side by side, or apart as in planes of
``[B, C, H, W]``; elements of samples in another order, as ``channels_last`` has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def classes_apart(logits: Tensor) -> bool:
    """Whether logits ``[..., C]`` have their classes apart, as ``movedim(1, -1)`` leaves them."""
    return logits.shape[-1] > 1 and logits.stride(-1) != 1 and logits.numel() > 0


def _split(x: Tensor) -> tuple[int, int]:
    """How many dimensions of ``[..., C]`` precede a group of rows in planes, and its size."""
    outer, group = x.dim() - 1, 1
    while outer > 0 and (x.shape[outer - 1] == 1 or x.stride(outer - 1) == group):
        outer, group = outer - 1, group * x.shape[outer - 1]
    return outer, group


def group_of(x: Tensor) -> int:
    """How many rows of ``[..., C]`` lie side by side in planes; 0 where so few do, or groups lie so
    irregularly, that a copy is faster. ``as_planes`` in csrc/loss/matrix.h is the same rule."""
    outer, group = _split(x)
    if group < 16 or not classes_apart(x) or x.shape[-1] >= 2**24:  # float32 counts up to there
        return 0
    expected = None  # stride of the next dimension, if those of groups are as one
    for d in reversed(range(outer)):
        if x.shape[d] == 1:
            continue
        if expected is not None and x.stride(d) != expected:
            return 0
        expected = x.stride(d) * x.shape[d]
    return group


def in_planes_of(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Probabilities ``[..., C]`` in planes where the logits are, copied if they are not."""
    group = group_of(logits)
    if group == 0 or group_of(probabilities) == group:
        return probabilities
    return torch.empty_like(logits, dtype=probabilities.dtype).copy_(probabilities)


def gradient_like(logits: Tensor) -> Tensor:
    """Memory for the gradient of logits ``[..., C]``: contiguous, or, where the classes lie apart,
    in the layout of the logits, so that whoever made these gets the gradient in the same layout."""
    return torch.empty_like(logits) if classes_apart(logits) else logits.new_empty(logits.shape)


def in_memory_order(samples: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Tensors ``[B, ...]``, contiguous, with their trailing dimensions in the order that those of
    the first have in memory. The first is a view; the others are copied if necessary, so that the
    backward pass need not do it again. If the first would need a copy, all are as they came."""
    if samples.is_contiguous():
        return samples, *(x.contiguous() for x in others)
    order = [0]
    for dim in range(1, samples.dim()):  # torch.compile cannot sort by sizes that it leaves open
        place = len(order)
        while place > 1 and samples.stride(order[place - 1]) < samples.stride(dim):
            place -= 1
        order.insert(place, dim)
    if not samples.permute(order).is_contiguous():
        return samples, *others
    return tuple(x.permute(order).contiguous() for x in (samples, *others))


def planes_of(x: Tensor) -> Tensor | None:
    """``[..., C]`` in planes as ``[groups, C, group]``, a view whose last two dimensions are
    contiguous; None where there is no such view."""
    outer, group = _split(x)
    if group_of(x) == 0 or x.stride(-1) != group:
        return None
    return x.movedim(-1, outer).view(math.prod(x.shape[:outer]), x.shape[-1], group)


def as_gradient(dx: Tensor, logits: Tensor) -> Tensor:
    """The contiguous gradient ``[N, C]`` or ``[..., C]`` in the shape and layout of the logits."""
    dx = dx.to(logits.dtype).reshape(logits.shape)
    return gradient_like(logits).copy_(dx) if classes_apart(logits) else dx
