"""``torch.ops.ksam`` operators of the loss room: schemas, output shapes and autograd formulas.

The public functions in ``ksam_kernels.loss.functional`` check arguments; these do not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksam_kernels.checks import opmath_dtype
from ksam_kernels.library import call_backward, operator
from ksam_kernels.loss import differentiable, native
from ksam_kernels.loss.layout import gradient_like


def _gradient(name: str, grad: Tensor, *args: Any) -> Tensor:
    dx = native.try_backward(name, grad, *args)
    if dx is None:
        dx = call_backward(name, grad, *args)
    return dx


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Serves both operators: select_cross_entropy has k between target and weight.
    logits, target, *_, weight, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.constants = len(inputs) - 1
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, target, output[1], weight)


def _cross_entropy_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, target, stats, weight = ctx.saved_tensors
    options = weight, ctx.ignore_index, ctx.label_smoothing
    if torch.is_grad_enabled():
        dx = differentiable.gradient(differentiable.cross_entropy, grad, logits, target, *options)
    else:
        dx = _gradient("cross_entropy_backward", grad, logits, target, stats, *options)
    return dx, *[None] * ctx.constants


def _elementwise_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _elementwise_grad(loss: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = ctx.saved_tensors
    if torch.is_grad_enabled():
        dx = differentiable.gradient(loss, grad, *args)
    else:
        dx = _gradient(f"{loss.__name__}_backward", grad, *args)
    return dx, *[None] * (len(args) - 1)


_bce_grad = partial(_elementwise_grad, differentiable.binary_cross_entropy_with_logits)
_mse_grad = partial(_elementwise_grad, differentiable.mse)


@operator(
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing)"
    " -> (Tensor losses, Tensor stats)",
    _cross_entropy_setup,
    _cross_entropy_grad,
)
def cross_entropy(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    losses = logits.new_empty(shape, dtype=torch.float32)
    return losses, logits.new_empty((*shape, 3), dtype=opmath_dtype(logits.dtype))


@operator(
    "(Tensor grad, Tensor logits, Tensor target, Tensor stats, Tensor? weight, int ignore_index,"
    " float label_smoothing) -> Tensor"
)
def cross_entropy_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return gradient_like(logits)


@operator(
    "(Tensor logits, Tensor target, SymInt k, Tensor? weight, int ignore_index,"
    " float label_smoothing) -> (Tensor losses, Tensor stats, Tensor indices)",
    _cross_entropy_setup,
    _cross_entropy_grad,
)
def select_cross_entropy(
    logits: Tensor, target: Tensor, k: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    losses = logits.new_empty((rows,), dtype=torch.float32)
    stats = logits.new_empty((rows, 3), dtype=opmath_dtype(logits.dtype))
    return losses, stats, logits.new_empty((k,), dtype=torch.int64)


@operator(
    "(Tensor logits, Tensor target, Tensor? pos_weight) -> Tensor", _elementwise_setup, _bce_grad
)
def binary_cross_entropy_with_logits(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@operator("(Tensor grad, Tensor logits, Tensor target, Tensor? pos_weight) -> Tensor")
def binary_cross_entropy_with_logits_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@operator("(Tensor pred, Tensor target) -> Tensor", _elementwise_setup, _mse_grad)
def mse(pred: Tensor, target: Tensor) -> Tensor:
    return pred.new_empty((pred.shape[0],), dtype=torch.float32)


@operator("(Tensor grad, Tensor pred, Tensor target) -> Tensor")
def mse_backward(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    return pred.new_empty(pred.shape)
