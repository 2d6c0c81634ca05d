"""Lists whose tensors are on several devices, as those of a model that is spread over GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ksam_kernels import backends
from ksam_kernels.perturb import native, reference


def lists(count: int, devices: tuple[str, ...]) -> list[list[Tensor]]:
    return [[torch.ones(4, 3, device=device) for device in devices] for _ in range(count)]


def arguments(name: str, devices: tuple[str, ...]) -> tuple[Any, ...]:
    one, steps = torch.ones((), device=devices[0]), [torch.ones((), device=d) for d in devices]
    made: dict[str, Callable[[], tuple[Any, ...]]] = {
        "grad_norm": lambda: (*lists(2, devices), True, 0.01),
        "perturb_": lambda: (*lists(3, devices), [0.05] * len(devices), False, 0.0),
        "restore_": lambda: (*lists(2, devices),),
        "restore_sgd_": lambda: (
            *lists(4, devices), steps, 0.1, 0.9, 0.0, 0.0, False, False, one, one,
        ),
        "restore_adam_": lambda: (
            *lists(5, devices), steps, 0.1, 0.9, 0.99, 1e-8, 0.0, False, True, one, one,
        ),
    }  # fmt: skip
    return made[name]()


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
    native.register("recorded", kernels, ("cuda",))
    monkeypatch.setattr(reference, name, getattr(plain, name))
    kernel = backends._kernels["recorded"][name]
    with FakeTensorMode():
        kernel(*arguments(name, ("cuda:0", "cuda:1", "cuda:1")))
        assert (kernels.calls, plain.calls) == ([], [name])
        kernel(*arguments(name, ("cuda:1", "cuda:1", "cuda:1")))
        assert (kernels.calls, plain.calls) == ([name], [name])
