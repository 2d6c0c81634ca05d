"""Per-sample losses by the compiled extension.

The kernels take logits whose rows have unit stride inside or lie side by side, and weights in the
dtype of the arithmetic. That is what almost every call has, so it is tried first; only where the
kernel declines are the arguments rearranged, the logits last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.checks import opmath_dtype
from ksam_kernels.library import attach, wants_grad
from ksam_kernels.loss.layout import as_gradient
from ksam_kernels.native import DEVICES, direct, extension, run


def _weight(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """Contiguous, in the dtype of the arithmetic on ``like``."""
    return None if weight is None else weight.to(opmath_dtype(like.dtype)).contiguous()


def _target(target: Tensor, like: Tensor) -> Tensor:
    """Contiguous, and if floating in a dtype that every kernel takes."""
    if target.is_floating_point() and target.dtype != like.dtype:
        target = target.to(opmath_dtype(like.dtype))
    return target.contiguous()


def _wants_grad(input: Tensor, *constants: Tensor | None) -> bool | None:
    """Whether there will be a backward pass; None where it would want a gradient that there is none
    of."""
    if not torch.is_grad_enabled():
        return False
    return None if any(map(wants_grad, constants)) else wants_grad(input)


def try_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: float
) -> Tensor | None:
    """The losses, if the kernel takes the arguments as they are."""
    kernel = direct("cross_entropy")
    with_stats = _wants_grad(logits, target, weight)
    if kernel is None or with_stats is None:
        return None
    outputs = kernel(logits, target, weight, *options, with_stats)
    if outputs is None:
        return None
    if with_stats:
        return attach("cross_entropy", outputs, logits, target, weight, *options)
    losses: Tensor = outputs[0]
    return losses


def try_select_cross_entropy(
    logits: Tensor, target: Tensor, k: int, weight: Tensor | None, *options: float
) -> tuple[Tensor, Tensor] | None:
    """Losses and indices, if the kernel takes the arguments as they are."""
    kernel = direct("select_cross_entropy")
    with_stats = _wants_grad(logits, target, weight)
    if kernel is None or with_stats is None:
        return None
    outputs = kernel(logits, target, k, weight, *options, with_stats)
    if outputs is None:
        return None
    losses, _, indices = outputs
    if with_stats:
        losses = attach("select_cross_entropy", outputs, logits, target, k, weight, *options)
    return losses, indices


def try_elementwise(name: str, input: Tensor, *constants: Tensor | None) -> Tensor | None:
    """The losses ``binary_cross_entropy_with_logits`` or ``mse``, if the kernel takes the arguments
    as they are."""
    kernel = direct(name)
    with_grad = _wants_grad(input, *constants)
    if kernel is None or with_grad is None:
        return None
    losses: Tensor | None = kernel(input, *constants)
    if with_grad and losses is not None:
        return attach(name, (losses,), input, *constants)
    return losses


def try_backward(name: str, grad: Tensor, *args: Any) -> Tensor | None:
    """The gradient of the first input, if the kernel takes the arguments as they are."""
    kernel = direct(name)
    dx: Tensor | None = None if kernel is None else kernel(grad, *args)
    return dx


def register(backend: str, kernels: Any, devices: tuple[str, ...]) -> None:
    """Make the kernels of a compiled module a backend's implementations on some devices."""

    @implements(backend, "cross_entropy", devices=devices)
    def cross_entropy(
        logits: Tensor,  # [..., C]
        target: Tensor,  # [...] or [..., C]
        weight: Tensor | None,  # [C]
        ignore_index: int,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """Losses [...] float32 and row statistics [..., 3] for the backward pass."""
        options = ignore_index, label_smoothing, True
        outputs: tuple[Tensor, Tensor] | None
        outputs = kernels.cross_entropy(logits, target, weight, *options)
        if outputs is None:
            args = _target(target, logits), _weight(weight, logits), *options
            outputs = kernels.cross_entropy(logits, *args)
        if outputs is None:
            outputs = run(kernels, "cross_entropy", logits.contiguous(), *args)
        return outputs

    @implements(backend, "select_cross_entropy", devices=devices)
    def select_cross_entropy(
        logits: Tensor,  # [B, C]
        target: Tensor,  # [B] or [B, C]
        k: int,
        weight: Tensor | None,  # [C]
        ignore_index: int,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B], row statistics [B, 3] and indices [k] of the k largest losses."""
        options = ignore_index, label_smoothing, True
        outputs: tuple[Tensor, Tensor, Tensor] | None
        outputs = kernels.select_cross_entropy(logits, target, k, weight, *options)
        if outputs is None:
            args = _target(target, logits), k, _weight(weight, logits), *options
            outputs = kernels.select_cross_entropy(logits, *args)
        if outputs is None:
            outputs = run(kernels, "select_cross_entropy", logits.contiguous(), *args)
        return outputs

    @implements(backend, "cross_entropy_backward", devices=devices)
    def cross_entropy_backward(
        grad: Tensor,  # [...]
        logits: Tensor,  # [..., C]
        target: Tensor,  # [...] or [..., C]
        stats: Tensor,  # [..., 3]
        weight: Tensor | None,  # [C]
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        """Gradient [..., C] of the logits, in their dtype."""
        options = ignore_index, label_smoothing
        dx: Tensor | None
        dx = kernels.cross_entropy_backward(grad, logits, target, stats, weight, *options)
        if dx is None:
            grad, stats = grad.float().contiguous(), stats.contiguous()
            args = _target(target, logits), stats, _weight(weight, logits), *options
            dx = kernels.cross_entropy_backward(grad, logits, *args)
        if dx is None:
            dx = run(kernels, "cross_entropy_backward", grad, logits.contiguous(), *args)
            dx = as_gradient(dx, logits)
        return dx

    def _pos_weight(pos_weight: Tensor | None, logits: Tensor) -> Tensor | None:
        """One weight per element of a sample."""
        return _weight(None if pos_weight is None else pos_weight.expand(logits.shape[1:]), logits)

    def _elementwise(
        name: str, input: Tensor, target: Tensor, *rest: Tensor | None, grad: Tensor | None = None
    ) -> Tensor:
        first = () if grad is None else (grad.float(),)
        input, target = input.contiguous(), target.contiguous()
        result: Tensor | None = getattr(kernels, name)(*first, input, target, *rest)
        if result is None:
            result = run(kernels, name, *first, input, _target(target, input), *rest)
        return result

    @implements(backend, "binary_cross_entropy_with_logits", devices=devices)
    def binary_cross_entropy_with_logits(
        logits: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
        pos_weight: Tensor | None,  # broadcasts to the trailing dimensions
    ) -> Tensor:
        """Losses [B] float32."""
        weight = _pos_weight(pos_weight, logits)
        return _elementwise("binary_cross_entropy_with_logits", logits, target, weight)

    @implements(backend, "binary_cross_entropy_with_logits_backward", devices=devices)
    def binary_cross_entropy_with_logits_backward(
        grad: Tensor,  # [B]
        logits: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
        pos_weight: Tensor | None,
    ) -> Tensor:
        """Gradient [B, ...] of the logits, in their dtype."""
        name = "binary_cross_entropy_with_logits_backward"
        return _elementwise(name, logits, target, _pos_weight(pos_weight, logits), grad=grad)

    @implements(backend, "mse", devices=devices)
    def mse(
        pred: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
    ) -> Tensor:
        """Losses [B] float32."""
        return _elementwise("mse", pred, target)

    @implements(backend, "mse_backward", devices=devices)
    def mse_backward(
        grad: Tensor,  # [B]
        pred: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
    ) -> Tensor:
        """Gradient [B, ...] of pred, in its dtype."""
        return _elementwise("mse_backward", pred, target, grad=grad)


if extension is not None:
    register("native", extension, DEVICES)
