"""Argument checks that all public functions share: what passes, and what an error names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ksam_kernels.checks import (
    check_count,
    check_finite,
    check_index_range,
    check_int,
    check_number,
    check_range,
)

NUMBERS: dict[str, Callable[[str, Any], None]] = {
    "any": check_number,
    "finite": check_finite,
    "in a range": lambda name, value: check_range(name, value, 0.0, 1.0),
}
INTS: dict[str, Callable[[str, Any], None]] = {
    "any": check_int,
    "count": lambda name, value: check_count(name, value, 0),
}


@pytest.mark.parametrize("check", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("value", [0, 1.0, Fraction(1, 3), np.float32(0.5), np.int64(1)], ids=repr)
def test_numbers_of_python_and_numpy_pass(check: Callable[[str, Any], None], value: Any) -> None:
    check("x", value)


@pytest.mark.parametrize("check", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("value", [True, False, np.True_, "0.5", None, torch.tensor(0.5)], ids=repr)
def test_what_is_no_number_is_refused(check: Callable[[str, Any], None], value: Any) -> None:
    with pytest.raises(TypeError, match=r"^x must be a number, got ") as caught:
        check("x", value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("check", INTS.values(), ids=INTS)
@pytest.mark.parametrize("value", [True, 1.0, "1", None], ids=repr)
def test_what_is_no_int_is_refused(check: Callable[[str, Any], None], value: Any) -> None:
    with pytest.raises(TypeError, match=f"^x must be an int.*, got {value!r}$"):
        check("x", value)


@pytest.mark.parametrize(
    ("low", "high", "value", "bound"),
    [
        (0.0, 1.0, -0.1, r"in \[0.0, 1.0\]"),
        (0.0, 1.0, 1.1, r"in \[0.0, 1.0\]"),
        (0.0, 1.0, float("nan"), r"in \[0.0, 1.0\]"),
        (0.0, float("inf"), float("inf"), "finite and >= 0.0"),
        (0.0, float("inf"), 10**400, "finite and >= 0.0"),
    ],
)
def test_a_number_out_of_range_is_refused(low: float, high: float, value: Any, bound: str) -> None:
    with pytest.raises(ValueError, match=f"^x must be {bound}, got {value!r}$"):
        check_range("x", value, low, high)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_in_range_pass(dtype: torch.dtype) -> None:
    check_index_range("indices", torch.tensor([[0, 3], [2, 1]], dtype=dtype), 4, "a batch")
    check_index_range("indices", torch.tensor([], dtype=dtype), 0, "a batch")


@pytest.mark.parametrize(("values", "bad"), [([0, 4], 4), ([-1, 3], -1), ([9, -2], -2)])
def test_an_index_out_of_range_is_named(values: list[int], bad: int) -> None:
    message = f"^indices holds {bad}, out of range for a batch of 4 samples$"
    with pytest.raises(IndexError, match=message):
        check_index_range("indices", torch.tensor(values), 4, "a batch")


def test_the_range_of_indices_on_a_device_is_not_waited_for() -> None:
    check_index_range("indices", torch.tensor([9], device="meta"), 4, "a batch")


@pytest.mark.parametrize("value", [sys.float_info.max, -sys.float_info.max])
def test_the_largest_numbers_are_finite(value: float) -> None:
    check_finite("x", value)
