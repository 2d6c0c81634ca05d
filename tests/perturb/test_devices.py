"""Lists whose tensors are on several devices, as those of a model that is spread over GPUs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ksam_kernels import backends
from ksam_kernels.perturb import native, reference
from tests.test_operators import SAMPLES


def moved(args: tuple[Any, ...], *devices: str) -> tuple[Any, ...]:
    """An operator's arguments with the tensors of every list on these devices in turn, and those
    outside of lists on the first."""

    def on(item: Any, device: str) -> Any:
        return torch.empty_like(item, device=device) if isinstance(item, Tensor) else item

    return tuple(
        list(map(on, arg, cycle(devices))) if isinstance(arg, list) else on(arg, devices[0])
        for arg in args
    )


class Recorder:
    """Functions that take what they are given, and note it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def function(*_: Any) -> bool:
            self.calls.append(name)
            return True

        return function


@pytest.mark.parametrize("name", backends.OPERATORS["perturb"])
def test_lists_on_several_devices_are_the_references(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, plain = Recorder(), Recorder()
    monkeypatch.setattr(backends, "_kernels", {**backends._kernels, "recorded": {}})
    monkeypatch.setattr(backends, "_devices", dict(backends._devices))
    native.register("recorded", kernels, ("xpu",))
    monkeypatch.setattr(reference, name, getattr(plain, name))
    kernel = backends._kernels["recorded"][name]
    args = SAMPLES[name]()[0]
    # Of no kind that the machine has one of: its second one is looked for, though fakes need none.
    with FakeTensorMode(allow_non_fake_inputs=True):
        kernel(*moved(args, "xpu:0", "xpu:1"))
        assert (kernels.calls, plain.calls) == ([], [name])
        kernel(*moved(args, "xpu:1"))
        assert (kernels.calls, plain.calls) == ([name], [name])
