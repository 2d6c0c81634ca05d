"""Argument checks shared by the public functions: each names the argument and the value."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int64, torch.int32)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic on tensors of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object) -> None:
    """A dense one: sparse, nested and the like are no rows of numbers in memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be {_names(allowed)}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have {meaning}, {tuple(expected)}, got shape {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a real number of Python or NumPy; a tensor is none, as it may have to be waited
    for."""
    return isinstance(value, (float, int, numbers.Real))


def plain_number(value: float) -> float:
    """A number as kernels take it, of Python: NumPy's bring those that they are compared with to
    their own type, which may be narrower."""
    kinds = (float, int, torch.SymFloat, torch.SymInt)
    return value if type(value) in kinds else float(value)


def check_number(name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_count(name: str, value: Any, low: int, below: int | None = None) -> None:
    """An int, ``low <= value < below``."""
    bound = f">= {low}" if below is None else f"in [{low}, {below})"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {bound}, got {value!r}")
    if value < low or (below is not None and value >= below):
        raise ValueError(f"{name} must be {bound}, got {value!r}")


# No function of ``math`` below: torch.compile traces comparisons of a number that changes, such as
# a learning rate, but no call of these.
def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Finite ``low <= value <= high``; NaN fails."""
    check_number(name, value)
    value = plain_number(value)
    if not low <= value <= min(high, sys.float_info.max):
        bound = f"in [{low}, {high}]" if high < math.inf else f"finite and >= {low}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Any number but NaN, the infinities and ints that no float is near."""
    check_number(name, value)
    value = plain_number(value)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_constant(name: str, tensor: Tensor | None) -> None:
    """No gradient flows to this argument, so one that asks for it would be lost in silence."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but gradients flow to the first argument only")
