"""What the contract tests share: bit patterns, layouts and error bounds."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ksam_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
U32 = 2.0**-24
#: (room, operator) of every operator.
OPERATORS = [(room, name) for room, names in backends.OPERATORS.items() for name in names]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def setup_py() -> ModuleType:
    """setup.py as a module; it needs setuptools."""
    spec = importlib.util.spec_from_file_location("ksam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads of PyTorch's pool, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For a conftest to import: small models gain nothing from threads, and lose beside others."""
    with threads(1):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within, what torch makes without a dtype has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def raises_out_of_range(backend: str, message: str) -> AbstractContextManager[Any]:
    """An IndexError with the message; for GPU kernels, which cannot raise it, their assertion."""
    if backend == "simt":
        return pytest.raises(RuntimeError, match=r"device-side assert: .*in_range")
    if backend == "triton-interpreter":
        return pytest.raises(Exception, match=r"AssertionError.*in range")
    return pytest.raises(IndexError, match=message)


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: the relative error of one rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def arithmetic_unit(dtype: torch.dtype) -> float:
    """Unit roundoff of the arithmetic on ``dtype``: float32's, or float64's for float64."""
    return unit(torch.float64 if dtype == torch.float64 else torch.float32)


def smallest(dtype: torch.dtype) -> float:
    """The smallest denormal number: the absolute error of a rounding that underflows."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor as integers (a copy, contiguous)."""
    copy = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    if copy.is_complex():
        copy = torch.view_as_real(copy)
    return copy.view(_BITS[copy.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(bits(a).view(-1), bits(b).view(-1))  # on GPUs it takes up to 64 dimensions


def all_same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bit patterns: quiet and signalling NaN payloads, infinities, denormals; -0 first."""
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    values = raw.view(dtype)
    if dtype.is_floating_point and dtype.itemsize > 1:
        infinity = bits(torch.tensor([float("inf")], dtype=dtype))
        values.view(infinity.dtype)[4::5] |= infinity  # exponent all ones, payload as it was
        values.view(infinity.dtype)[5:6] = infinity + 5  # a signalling NaN
        special = [-0.0, float("inf"), -float("inf"), torch.finfo(dtype).smallest_normal / 4]
        values[:4] = torch.tensor(special, dtype=dtype)[:count]
    return values.reshape(shape)


def sliced(x: Tensor) -> Tensor:
    """The same values as every second column of a wider tensor filled with NaN."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def transposed(x: Tensor) -> Tensor:
    """The same values with the memory order of the dimensions reversed."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """|actual - expected| <= tolerance elementwise; NaN and infinities exactly where expected."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand_as(expected)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(
        actual.nan_to_num(0, 1e999, -1e999).isinf(), expected.nan_to_num(0, 1e999, -1e999).isinf()
    )
    assert torch.equal(actual[actual.isinf()], expected[expected.isinf()])
    finite = expected.isfinite()
    error = (actual - expected).abs()[finite]
    worst = (error / tolerance[finite].clamp_min(1e-300)).max().item() if error.numel() else 0.0
    assert worst <= 1, f"error is {worst:.3g} times the bound"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_ends(pid_file: Path) -> None:
    """The process whose number the file holds comes to its end; a zombie has no command."""
    command = Path("/proc", str(int(pid_file.read_text())), "cmdline")

    def runs() -> bool:
        try:
            return bool(command.read_bytes())
        except OSError:
            return False

    wait_for(lambda: not runs(), 10.0)


def run_python(*args: str, backend: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the tests with KSAM_BACKEND as given, None: without it."""
    environment = {key: value for key, value in os.environ.items() if key != "KSAM_BACKEND"}
    if backend is not None:
        environment["KSAM_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=False
    )
