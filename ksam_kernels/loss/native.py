"""Per-sample losses by the compiled extension.

The kernels take logits whose rows have unit stride inside or lie side by side, and weights in the
dtype of the arithmetic. That is what almost every call has, so it is tried first; only where the
kernel declines are the arguments rearranged, the logits last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.checks import opmath_dtype
from ksam_kernels.library import attach, wants_grad
from ksam_kernels.loss.layout import as_gradient
from ksam_kernels.native import DEVICES, direct, extension, run


def _weight(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """The weight, contiguous and in the dtype of the arithmetic on ``like``."""
    return None if weight is None else weight.to(opmath_dtype(like.dtype)).contiguous()


def _target(target: Tensor, like: Tensor) -> Tensor:
    """The target, contiguous, and if it is floating, in a dtype that every kernel takes."""
    if target.is_floating_point() and target.dtype != like.dtype:
        target = target.to(opmath_dtype(like.dtype))
    return target.contiguous()


def _wants_grad(input: Tensor, *constants: Tensor | None) -> bool | None:
    """Whether there will be a backward pass; None if a gradient is wanted of ``constants``, which
    have none."""
    if not torch.is_grad_enabled():
        return False
    return None if any(map(wants_grad, constants)) else wants_grad(input)


def try_forward(name: str, logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...] | None:
    """What ``cross_entropy`` or ``select_cross_entropy`` returns, if the kernel takes the arguments
    as they are; rest: [k,] weight, ignore_index, label_smoothing."""
    kernel = direct(name)
    with_stats = _wants_grad(logits, target, rest[-3])
    if kernel is None or with_stats is None:
        return None
    outputs: tuple[Tensor, ...] | None = kernel(logits, target, *rest, with_stats)
    if outputs is not None and with_stats:
        return attach(name, outputs, logits, target, *rest), *outputs[1:]
    return outputs


def try_elementwise(name: str, input: Tensor, *constants: Tensor | None) -> Tensor | None:
    """The losses of ``binary_cross_entropy_with_logits`` or ``mse``, if the kernel takes the
    arguments as they are."""
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


def _forward(
    kernels: Any, name: str, logits: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Losses, row statistics for the backward pass and, of a selection, indices."""
    *k, weight, ignore_index, label_smoothing = rest
    options = ignore_index, label_smoothing, True
    outputs: tuple[Tensor, ...] | None
    outputs = getattr(kernels, name)(logits, target, *k, weight, *options)
    if outputs is None:
        args = _target(target, logits), *k, _weight(weight, logits), *options
        outputs = getattr(kernels, name)(logits, *args)
    if outputs is None:
        outputs = run(kernels, name, logits.contiguous(), *args)
    return outputs


def _backward(
    kernels: Any,
    name: str,
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    *rest: Any,
) -> Tensor:
    """The gradient of the logits, in their dtype."""
    weight, *options = rest
    dx: Tensor | None = getattr(kernels, name)(grad, logits, target, stats, *rest)
    if dx is None:
        grad, stats = grad.float().contiguous(), stats.contiguous()
        args = _target(target, logits), stats, _weight(weight, logits), *options
        dx = getattr(kernels, name)(grad, logits, *args)
    if dx is None:
        dx = run(kernels, name, grad, logits.contiguous(), *args)
        dx = as_gradient(dx, logits)
    return dx


def _elementwise(
    kernels: Any,
    name: str,
    input: Tensor,
    target: Tensor,
    *pos_weight: Tensor | None,
    grad: tuple[Tensor, ...] = (),
) -> Tensor:
    """The losses; with an upstream ``grad`` the gradient of the input."""
    input, target = input.contiguous(), target.contiguous()
    # One weight per element of a sample.
    weight = [_weight(p if p is None else p.expand(input.shape[1:]), input) for p in pos_weight]
    result: Tensor | None = getattr(kernels, name)(*grad, input, target, *weight)
    if result is None:
        result = run(kernels, name, *grad, input, _target(target, input), *weight)
    return result


def _elementwise_backward(kernels: Any, name: str, grad: Tensor, *args: Any) -> Tensor:
    return _elementwise(kernels, name, *args, grad=(grad.float(),))


_CALLS: dict[str, Any] = {
    "cross_entropy": _forward,
    "select_cross_entropy": _forward,
    "cross_entropy_backward": _backward,
    "mse": _elementwise,
    "mse_backward": _elementwise_backward,
    "binary_cross_entropy_with_logits": _elementwise,
    "binary_cross_entropy_with_logits_backward": _elementwise_backward,
}


def register(backend: str, kernels: Any, devices: tuple[str, ...]) -> None:
    """Make the kernels of a compiled module a backend's implementations on some devices."""
    for name, call in _CALLS.items():
        implements(backend, name, devices=devices)(partial(call, kernels, name))


if extension is not None:
    register("native", extension, DEVICES)
