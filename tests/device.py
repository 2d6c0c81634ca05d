"""The device of the contract tests: ``KSAM_TEST_DEVICE``, the CPU unless it says another.

What a *test* creates without naming a device goes there, as under ``torch.set_default_device``; but
unlike there, what the library and the optimizers create does not. A device that they forget to name
is therefore as wrong in the tests as it would be for a user, who has no default device.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
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
    """From now on, for the modules of tests that are imported later, too."""
    if _named:
        DeviceOfTests(DEVICE).__enter__()


#: Why some tests have no form on other devices than the CPU.
ASSERTS = (
    "an index or class out of range is an IndexError on the CPU only; elsewhere it fails an "
    "assertion on the device, after which the process can go on with nothing there: "
    "tests/test_device_assertions.py has these cases in processes of their own"
)


def provokes_assertion(item: pytest.Item) -> bool:
    """Whether the test hands an operator an index or a class that is out of range."""
    if not isinstance(item, pytest.Function):
        return False
    drawn = getattr(item.function, "hypothesis", None)  # whose wrapper has another source
    source = inspect.getsource(item.function if drawn is None else drawn.inner_test)
    return "IndexError" in source or "raises_out_of_range" in source
