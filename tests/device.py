"""The device of the contract tests: ``KSAM_TEST_DEVICE``, the CPU unless it says another.

What a *test* creates without naming a device goes there, as under ``torch.set_default_device``; but
unlike there, what the library and the optimizers create does not. A device that they forget to name
is therefore as wrong in the tests as it would be for a user, who has no default device.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch.utils._device import DeviceContext, _device_constructors

_named = os.environ.get("KSAM_TEST_DEVICE", "")

DEVICE = torch.device(_named or "cpu")

#: Whose tensors go to the device: the tests' own, and those of the layers they build.
_CREATORS = ("tests.", "torch.nn.")


class DeviceOfTests(DeviceContext):
    """The default device for code in certain modules only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            creator = sys._getframe(1).f_globals.get("__name__", "")
            if creator.startswith(_CREATORS):
                kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


def use_device_of_tests() -> None:
    """Put it in force from now on, also for the modules of tests that are imported later."""
    if _named:
        DeviceOfTests(DEVICE).__enter__()


#: Why some tests have no form on other devices than the CPU.
ASSERTS = (
    "an index or class out of range is an IndexError on the CPU only; elsewhere it fails an "
    "assertion on the device, which ends all that the process does there: "
    "tests/test_device_assertions.py has such cases in processes of their own"
)


def provokes_assertion(item: pytest.Item) -> bool:
    """Whether the test hands an operator an index or a class that is out of range."""
    if not isinstance(item, pytest.Function):
        return False
    drawn = getattr(item.function, "hypothesis", None)  # the wrapper has another source
    return _expects_index_error(item.function if drawn is None else drawn.inner_test)


@functools.cache
def _expects_index_error(function: FunctionType) -> bool:
    """Whether it names IndexError, or another function of the tests that does."""
    try:
        source = inspect.getsource(function)
    except OSError:  # hypothesis' strategies, whose source is nowhere
        return False
    named = (function.__globals__.get(name) for name in set(re.findall(r"\w+", source)))
    return "IndexError" in source or any(
        isinstance(other, FunctionType)
        and other is not function
        and other.__module__.startswith("tests.")
        and _expects_index_error(other)
        for other in named
    )
