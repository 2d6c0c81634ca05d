"""A GPU that Triton cannot compile for takes the next backend, and the report says why."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ksam_kernels import backends, triton_support

GPU = torch.device("cuda", 0)
TARGETS = [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]


class Driver:
    """Triton's driver for a GPU that can do nothing: loading or launching finds no attribute."""

    def __init__(self, target: GPUTarget | None) -> None:
        self.target = target
        self.asked = 0

    def get_current_device(self) -> Any:
        self.asked += 1
        return self.target  # compiled kernels are looked up by it

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.target is None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify one.")
        return self.target


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a driver Triton's, in a process that has asked for nothing yet and has no extension."""
    fresh = lru_cache(triton_support._cannot_compile_for.__wrapped__)
    monkeypatch.setattr(triton_support, "_cannot_compile_for", fresh)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(backends, "_choices", [["auto"]])
    monkeypatch.setitem(backends._kernels, "native", {})
    return lambda made: monkeypatch.setattr(driver, "_active", made)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.backend)
def test_it_is_found_out_once_and_without_a_launch(use: Any, target: GPUTarget) -> None:
    made = Driver(target)
    use(made)
    assert backends.resolve("mse", GPU)[0] == "triton"
    asked = made.asked
    assert asked > 0
    assert backends.resolve("topk_indices", GPU)[0] == "triton"
    assert made.asked == asked


def test_auto_goes_on_and_a_name_raises_with_the_reason(use: Any) -> None:
    use(Driver(None))
    assert backends.resolve("mse", GPU)[0] == "reference"
    reason = backends.why_not("triton", "mse", GPU)
    assert reason == ("Triton cannot compile for cuda:0: RuntimeError: Failed to find C compiler.")
    with (
        backends.use_backend("triton"),
        pytest.raises(backends.BackendUnavailableError, match="Failed to find C compiler"),
    ):
        backends.resolve("mse", GPU)


def test_every_gpu_is_asked_for_itself(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    def device(given: torch.device) -> Any:
        entered.append(given.index)
        return nullcontext()

    use(Driver(None))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for at in (torch.device("cuda", 1), torch.device("cuda"), torch.device("cuda", 2)):
        assert backends.why_not("triton", "mse", at) is not None
    assert entered == [1, 2]


def test_neither_the_import_nor_tensors_on_the_cpu_compile_or_wake_a_gpu() -> None:
    code = """
import sys, ksam_kernels as kk
assert "triton" not in sys.modules
import torch
kk.mse(torch.zeros(2), torch.zeros(2))
torch.ops.ksam.topk_indices(torch.zeros(3), 1)
kk.restore_([], [])
assert not torch.cuda.is_initialized()
assert "ksam_kernels.triton_probe" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_without_kernels_is_told_once(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(None))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setitem(backends._kernels["reference"], "mse", lambda: "done")
    told = r"cuda:0 as plain PyTorch.*Failed to find C compiler"
    with pytest.warns(UserWarning, match=told) as caught:
        assert backends.call("mse", GPU) == "done"
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.call("mse", GPU)
        backends._warned.clear()
        with backends.use_backend("reference"):
            backends.call("mse", GPU)
        backends.call("grad_norm", torch.device("cpu"), [torch.ones(2)], [], False, 0.0)
    assert backends._warned == set()
