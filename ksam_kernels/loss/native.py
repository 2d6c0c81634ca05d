"""Per-sample losses by the compiled extension.

The kernels take logits whose rows have unit stride inside, and weights in the dtype of the
arithmetic. That is what almost every call has, so it is tried first; only where the kernel declines
are the arguments rearranged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.checks import is_number, opmath_dtype
from ksam_kernels.library import attach, wants_grad
from ksam_kernels.native import DEVICES, direct, extension, run


def _weight(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """Contiguous, in the dtype of the arithmetic on ``like``."""
    return None if weight is None else weight.to(opmath_dtype(like.dtype)).contiguous()


def _target(target: Tensor, like: Tensor) -> Tensor:
    """Contiguous, and if floating in a dtype that every kernel takes."""
    if target.is_floating_point() and target.dtype != like.dtype:
        target = target.to(opmath_dtype(like.dtype))
    return target.contiguous()


# On the device of the logits whatever the default device is. Sizes one by one are read in half the
# time of a torch.Size.
def _losses(logits: Tensor) -> Tensor:
    """Losses [...], to be written."""
    *rows, _ = logits.shape
    return logits.new_empty(rows, dtype=torch.float32)


def _stats(logits: Tensor) -> Tensor:
    """Row statistics [..., 3], to be written."""
    *rows, _ = logits.shape
    return logits.new_empty((*rows, 3), dtype=opmath_dtype(logits.dtype))


def _indices(logits: Tensor, k: int) -> Tensor:
    """Indices [k], to be written."""
    return logits.new_empty(k, dtype=torch.int64)


def _may_try(logits: Tensor, target: Tensor, weight: Tensor | None, *options: float) -> bool:
    """Whether a kernel may be tried with arguments that are not checked: no gradient is wanted but
    that of the logits, and the options, which no kernel checks, are in their ranges."""
    ignore_index, label_smoothing = options
    return (
        type(logits) is Tensor
        and type(target) is Tensor
        and logits.dim() > 0
        and not (logits.is_neg() or target.is_neg())
        and type(ignore_index) is int
        and is_number(label_smoothing)
        and 0 <= label_smoothing <= 1
        and (ignore_index < 0 or not target.is_floating_point())
        and not (
            (target.requires_grad or (weight is not None and wants_grad(weight)))
            and torch.is_grad_enabled()
        )
    )


def try_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: float
) -> Tensor | None:
    """The losses, if the kernel takes the arguments as they are."""
    kernel = direct("cross_entropy")
    if kernel is None or not _may_try(logits, target, weight, *options):
        return None
    losses = _losses(logits)
    stats = _stats(logits) if logits.requires_grad and torch.is_grad_enabled() else None
    if not kernel(logits, target, weight, *options, losses, stats):
        return None
    if stats is None:
        return losses
    return attach("cross_entropy", (losses, stats), logits, target, weight, *options)


def try_select_cross_entropy(
    logits: Tensor, target: Tensor, k: int, weight: Tensor | None, *options: float
) -> tuple[Tensor, Tensor] | None:
    """Losses and indices, if the kernel takes the arguments as they are."""
    kernel = direct("select_cross_entropy")
    if kernel is None or not _may_try(logits, target, weight, *options):
        return None
    if type(k) is not int or logits.dim() != 2 or not 1 <= k <= logits.shape[0]:
        return None
    losses, indices = _losses(logits), _indices(logits, k)
    stats = _stats(logits) if logits.requires_grad and torch.is_grad_enabled() else None
    if not kernel(logits, target, weight, *options, losses, stats, indices):
        return None
    if stats is not None:
        outputs = losses, stats, indices
        losses = attach("select_cross_entropy", outputs, logits, target, k, weight, *options)
    return losses, indices


def try_cross_entropy_backward(grad: Tensor, logits: Tensor, *args: Any) -> Tensor | None:
    """The gradient of the logits, if the kernel takes the arguments as they are."""
    kernel = direct("cross_entropy_backward")
    if kernel is None or grad.is_neg() or logits.is_neg():
        return None
    if torch.is_grad_enabled():  # a second derivative raises in the operator
        return None
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return out if kernel(grad, logits, *args, out) else None


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
        outputs = _losses(logits), _stats(logits)
        options = ignore_index, label_smoothing
        if not kernels.cross_entropy(logits, target, weight, *options, *outputs):
            logits, target = logits.contiguous(), _target(target, logits)
            run(
                kernels,
                "cross_entropy",
                logits,
                target,
                _weight(weight, logits),
                *options,
                *outputs,
            )
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
        outputs = _losses(logits), _stats(logits), _indices(logits, k)
        options = ignore_index, label_smoothing
        if not kernels.select_cross_entropy(logits, target, weight, *options, *outputs):
            logits, target = logits.contiguous(), _target(target, logits)
            run(
                kernels,
                "select_cross_entropy",
                logits,
                target,
                _weight(weight, logits),
                *options,
                *outputs,
            )
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
        out = logits.new_empty(logits.shape)
        options = ignore_index, label_smoothing
        if not kernels.cross_entropy_backward(grad, logits, target, stats, weight, *options, out):
            grad, stats = grad.float().contiguous(), stats.contiguous()
            logits, target = logits.contiguous(), _target(target, logits)
            run(
                kernels,
                "cross_entropy_backward",
                grad,
                logits,
                target,
                stats,
                _weight(weight, logits),
                *options,
                out,
            )
        return out

    def _pos_weight(pos_weight: Tensor | None, logits: Tensor) -> Tensor | None:
        """One weight per element of a sample."""
        return _weight(None if pos_weight is None else pos_weight.expand(logits.shape[1:]), logits)

    def _elementwise(
        name: str, input: Tensor, target: Tensor, *rest: Tensor | None, grad: Tensor | None = None
    ) -> None:
        first = () if grad is None else (grad,)
        if not getattr(kernels, name)(*first, input, target, *rest):
            run(kernels, name, *first, input, _target(target, input), *rest)

    @implements(backend, "binary_cross_entropy_with_logits", devices=devices)
    def binary_cross_entropy_with_logits(
        logits: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
        pos_weight: Tensor | None,  # broadcasts to the trailing dimensions
    ) -> Tensor:
        """Losses [B] float32."""
        logits, target = logits.contiguous(), target.contiguous()
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        weight = _pos_weight(pos_weight, logits)
        _elementwise("binary_cross_entropy_with_logits", logits, target, weight, losses)
        return losses

    @implements(backend, "binary_cross_entropy_with_logits_backward", devices=devices)
    def binary_cross_entropy_with_logits_backward(
        grad: Tensor,  # [B]
        logits: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
        pos_weight: Tensor | None,
    ) -> Tensor:
        """Gradient [B, ...] of the logits, in their dtype."""
        logits, target = logits.contiguous(), target.contiguous()
        out = logits.new_empty(logits.shape)
        weight = _pos_weight(pos_weight, logits)
        name = "binary_cross_entropy_with_logits_backward"
        _elementwise(name, logits, target, weight, out, grad=grad.float())
        return out

    @implements(backend, "mse", devices=devices)
    def mse(
        pred: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
    ) -> Tensor:
        """Losses [B] float32."""
        pred, target = pred.contiguous(), target.contiguous()
        losses = pred.new_empty(pred.shape[0], dtype=torch.float32)
        _elementwise("mse", pred, target, losses)
        return losses

    @implements(backend, "mse_backward", devices=devices)
    def mse_backward(
        grad: Tensor,  # [B]
        pred: Tensor,  # [B, ...]
        target: Tensor,  # [B, ...]
    ) -> Tensor:
        """Gradient [B, ...] of pred, in its dtype."""
        pred, target = pred.contiguous(), target.contiguous()
        out = pred.new_empty(pred.shape)
        _elementwise("mse_backward", pred, target, out, grad=grad.float())
        return out


if extension is not None:
    register("native", extension, DEVICES)
