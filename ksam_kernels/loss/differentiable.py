"""Per-sample losses by PyTorch's own differentiable operations, where a kernel's one derivative is
not enough: second derivatives, forward-mode ones, and the transforms of ``torch.func``.

A loss and its gradient are then what autograd makes of these operations, at eager PyTorch's speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ksam_kernels.checks import opmath_dtype
from ksam_kernels.loss.reference import mean_per_sample, mse

__all__ = ["binary_cross_entropy_with_logits", "cross_entropy", "gradient", "mse"]


def cross_entropy(
    logits: Tensor,  # [..., C]
    target: Tensor,  # [...] or [..., C]
    weight: Tensor | None,  # [C]
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Losses [...] float32."""
    x = logits.to(opmath_dtype(logits.dtype))
    if target.is_floating_point():
        target = target.to(x.dtype).reshape(-1, x.shape[-1])
    else:
        # A zero gradient times NaN would be NaN.
        x = x.masked_fill((target == ignore_index).unsqueeze(-1), 0)
        target = target.long().reshape(-1)
    losses = F.cross_entropy(
        x.reshape(-1, x.shape[-1]),
        target,
        weight=None if weight is None else weight.to(x.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses.reshape(logits.shape[:-1]).float()


def binary_cross_entropy_with_logits(
    logits: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    pos_weight: Tensor | None,  # broadcasts to the trailing dimensions
) -> Tensor:
    """Losses [B] float32."""
    dtype = opmath_dtype(logits.dtype)
    weight = None if pos_weight is None else pos_weight.to(dtype)
    elements = F.binary_cross_entropy_with_logits(
        logits.to(dtype), target.to(dtype), pos_weight=weight, reduction="none"
    )
    return mean_per_sample(elements)


def gradient(loss: Any, grad: Tensor, input: Tensor, *constants: Any) -> Tensor:
    """The gradient of ``loss(input, *constants)`` for the upstream gradient ``grad``, with a graph
    to both."""
    of = input.view_as(input)  # a node of its own: grad may have come from the input too
    (dx,) = torch.autograd.grad(loss(of, *constants), of, grad, create_graph=True)
    return dx
