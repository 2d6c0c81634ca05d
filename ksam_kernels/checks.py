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
    """Raise TypeError naming argument and value unless it is a dense tensor: sparse, nested and the
    like are no rows of numbers in memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError naming argument and dtype unless it is a dense tensor of an allowed dtype."""
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be {_names(allowed)}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError naming argument and shape unless the tensor has the expected shape, which
    ``meaning`` puts into words."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have {meaning}, {tuple(expected)}, got shape {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError naming argument and device unless two tensors are on the same device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a real number of Python or NumPy: not a bool, and not a tensor, which one may
    have to wait for."""
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def plain_number(value: float) -> float:
    """The number as one of Python, as kernels take it: NumPy's convert what they are compared with
    to their own type, which may be narrower."""
    kinds = (float, int, torch.SymFloat, torch.SymInt)
    return value if type(value) in kinds else float(value)


def check_number(name: str, value: Any) -> None:
    """Raise TypeError naming argument and value unless :func:`is_number` takes it for one."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_int(name: str, value: Any) -> None:
    """Raise TypeError naming argument and value unless it is an int, or one that ``torch.compile``
    traces; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_count(name: str, value: Any, low: int, below: int | None = None) -> None:
    """Raise TypeError or ValueError naming argument and value unless it is an int, not a bool, with
    ``low <= value < below``."""
    bound = f">= {low}" if below is None else f"in [{low}, {below})"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {bound}, got {value!r}")
    if value < low or (below is not None and value >= below):
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def check_index_range(name: str, indices: Tensor, size: int, of: str) -> None:
    """Raise IndexError naming argument and value unless all indices are in [0, size).

    Only on the CPU: other devices assert in the kernel that reads them; asking them here would wait
    for the device.

    Args:
        indices: integers of any shape.
        of: what holds the ``size`` samples, "a batch" say.
    """
    if indices.device.type == "cpu" and indices.numel() > 0:
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise IndexError(f"{name} holds {bad}, out of range for {of} of {size} samples")


# No function of ``math`` below: torch.compile traces comparisons of a number that changes, such as
# a learning rate, but not calls of such a function.
def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise TypeError or ValueError naming argument and value unless it is a number, finite, with
    ``low <= value <= high``."""
    check_number(name, value)
    value = plain_number(value)
    if not low <= value <= min(high, sys.float_info.max):
        bound = f"in [{low}, {high}]" if high < math.inf else f"finite and >= {low}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raise TypeError or ValueError naming argument and value unless it is a number other than NaN,
    the infinities and ints that no float is near."""
    check_number(name, value)
    value = plain_number(value)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError naming the argument if it requires grad: no gradient flows to it, so one
    that it asks for would be silently lost."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad, as only the first argument gets a gradient; pass "
            f"{name}.detach()"
        )
