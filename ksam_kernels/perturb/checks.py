"""Checks of the lists that the perturb room's functions take: each names the list, the place in it
and the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ksam_kernels.checks import FLOATING, check_dtype, check_finite, plain_number


def check_list(name: str, tensors: list[Tensor], *, written: bool = False) -> None:
    """Raise TypeError or ValueError naming list, place and value unless all are dense floating
    tensors of one device type, without elements that share memory if they are written."""
    for i, tensor in enumerate(tensors):
        check_dtype(f"{name}[{i}]", tensor, FLOATING)
        if tensor.device.type != tensors[0].device.type:
            raise ValueError(
                f"{name}[{i}] must be on {tensors[0].device.type} like {name}[0], "
                f"got {tensor.device}"
            )
        if written and _overlaps_itself(tensor):
            raise ValueError(
                f"{name}[{i}] must not have elements that share memory, as it is written in place, "
                f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of its elements share memory by a stride of 0; torch checks no more either."""
    strides = tensor.stride()
    return (
        0 in strides
        and tensor.numel() > 0
        and any(
            stride == 0 and size > 1 for size, stride in zip(tensor.shape, strides, strict=True)
        )
    )


def check_as_many(
    name: str, tensors: list[Tensor], params: list[Tensor], model: str = "params"
) -> None:
    """Raise ValueError naming list and length unless it is as long as the one named ``model``."""
    if len(tensors) != len(params):
        raise ValueError(
            f"{name} must hold as many tensors as {model}, {len(params)}, got {len(tensors)}"
        )


def check_like(
    name: str,
    tensors: list[Tensor],
    params: list[Tensor],
    *,
    model: str = "params",
    same_dtype: bool = False,
    written: bool = False,
) -> None:
    """Raise TypeError or ValueError naming list, place and value unless it passes
    :func:`check_list` and has, for each tensor of the list named ``model``, one of its shape and
    device, and with ``same_dtype`` of its dtype."""
    check_list(name, tensors, written=written)
    check_as_many(name, tensors, params, model)
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor.shape != param.shape or tensor.device != param.device:
            raise ValueError(
                f"{name}[{i}] must have shape {tuple(param.shape)} on {param.device} like "
                f"{model}[{i}], got {tuple(tensor.shape)} on {tensor.device}"
            )
        if same_dtype and tensor.dtype != param.dtype:
            raise TypeError(
                f"{name}[{i}] must be {param.dtype} like {model}[{i}], got {tensor.dtype}"
            )


def check_steps(steps: list[Tensor], params: list[Tensor]) -> None:
    """Raise TypeError or ValueError naming place and value unless there is a step count for each of
    the parameters: one float32 element on its device."""
    check_as_many("steps", steps, params)
    for i, (step, param) in enumerate(zip(steps, params, strict=True)):
        check_dtype(f"steps[{i}]", step, (torch.float32,))
        if step.numel() != 1 or step.device != param.device:
            raise ValueError(
                f"steps[{i}] must have one element on {param.device} like params[{i}], "
                f"got shape {tuple(step.shape)} on {step.device}"
            )


def listed(name: str, values: Any) -> list[float]:
    """A sequence as a list; raise TypeError naming argument and value if it is none."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {values!r}")
    return list(values)


def check_scalar(name: str, scalar: Tensor | None) -> None:
    """Raise TypeError or ValueError naming argument and value unless it is None or one float32
    element."""
    if scalar is not None:
        check_dtype(name, scalar, (torch.float32,))
        if scalar.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(scalar.shape)}")


def checked_rate(lr: Any) -> tuple[float, Tensor | None]:
    """A learning rate as a number, or 0 and the tensor that the kernels read; raise TypeError or
    ValueError naming the value unless it is a finite number or one float32 element."""
    if not isinstance(lr, Tensor):
        check_finite("lr", lr)
        return plain_number(lr), None
    check_scalar("lr", lr)
    return 0.0, lr


def checked_radii(radii: Sequence[Any]) -> list[float]:
    """Radii as floats; raise TypeError or ValueError naming the value unless all are finite
    numbers."""
    for radius in radii:
        if type(radius) is not float or not -math.inf < radius < math.inf:  # few of many
            check_finite("rho", radius)
    return [float(radius) for radius in radii]
