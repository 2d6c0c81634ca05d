"""CPU kernels for every instruction set that the processor has: which run, and the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from ksam_kernels.native import extension
from tests.helpers import ROOT, same_bits

pytestmark = pytest.mark.skipif(extension is None, reason="there are no native kernels")

SETS = ("baseline", "avx2", "avx512")

# Sizes around a vector and a chunk; what every room computes, by name.
RESULTS = """
import sys, torch, ksam_kernels as kk
from ksam_kernels import _C

found = {}

def losses(name, loss, x, target, **options):
    value = loss(x, target, **options)
    found[name] = value.detach()
    (found[name + " backward"],) = torch.autograd.grad(value.sum(), x)

def optimizer(name, dtype):
    shapes = [(3,), (), (0,), (17, 5), (70_001,)]
    new = lambda: [torch.randn(shape).to(dtype) for shape in shapes]
    params, grads, backup, buffers, means = (new() for _ in range(5))
    squares, steps = [x.square() for x in new()], [torch.tensor(3.0) for _ in shapes]
    found[name + " norm"] = kk.perturb_(params, grads, backup, rho=0.05, adaptive=True, eta=0.01)
    for i, x in enumerate(params):
        found[f"{name} perturb {i}"] = x.clone()
    kk.restore_sgd_(params, backup, grads, buffers, lr=0.1, momentum=0.9, weight_decay=1e-4)
    kk.perturb_(params, grads, backup, rho=0.05)
    kk.restore_adam_(params, backup, grads, means, squares, steps, lr=0.1, weight_decay=0.01)
    for kind, tensors in {"p": params, "b": buffers, "m": means, "v": squares}.items():
        found.update({f"{name} update {kind}{i}": x for i, x in enumerate(tensors)})

torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for n in (1, 15, 17, 1000, 4099):
        x = (3 * torch.randn(9, n)).to(dtype).requires_grad_()
        y, p = torch.randint(n, (9,)), torch.rand(9, n).to(dtype)
        options = {"weight": torch.rand(n) + 0.5, "label_smoothing": 0.1}
        losses(f"hard {dtype} {n}", kk.cross_entropy, x, y)
        losses(f"smoothed {dtype} {n}", kk.cross_entropy, x, y, **options)
        losses(f"soft {dtype} {n}", kk.cross_entropy, x, p)
        losses(f"bce {dtype} {n}", kk.binary_cross_entropy_with_logits, x, p)
        losses(f"mse {dtype} {n}", kk.mse, x, p)
        found[f"topk {dtype} {n}"] = kk.topk_indices(x.detach()[0], (n + 2) // 3)
    optimizer(f"optimizer {dtype}", dtype)
torch.save((_C.cpu_isa, found), sys.argv[1])
"""

#: The instruction set that ran, and what it computed.
Run = tuple[str, dict[str, Tensor]]


def run(isa: str | None, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KSAM_BACKEND": "native"}
    environment.pop("KSAM_CPU_ISA", None)
    if isa is not None:
        environment["KSAM_CPU_ISA"] = isa
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def refusal(isa: str) -> str:
    """Why no instruction set runs where this one is asked for."""
    result = run(isa, "import torch; from ksam_kernels import _C")
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Run]:
    """What the instruction set asked for gives; None: the one that runs if none is asked for."""

    @cache
    def of(isa: str | None) -> Run:
        path = tmp_path_factory.mktemp("isa") / "found"
        result = run(isa, RESULTS, path)
        assert result.returncode == 0, result.stderr
        found: Run = torch.load(path)
        return found

    return of


@pytest.mark.parametrize("isa", SETS)
def test_the_variable_names_one(isa: str, results: Callable[[str | None], Run]) -> None:
    best, _ = results(None)
    if SETS.index(isa) <= SETS.index(best):
        assert results(isa)[0] == isa
    else:
        message = f"KSAM_CPU_ISA asks for {isa}, but this processor supports at most {best}"
        assert refusal(isa) == f"ImportError: {message}"


def test_another_name_is_a_mistake() -> None:
    message = "KSAM_CPU_ISA must be baseline, avx2 or avx512, got AVX2"
    assert refusal("AVX2") == f"ImportError: {message}"


def test_an_empty_variable_names_none() -> None:
    assert run("", "from ksam_kernels import _C").returncode == 0


@pytest.mark.parametrize("isa", SETS[:2])
def test_the_best_has_the_bits_of(isa: str, results: Callable[[str | None], Run]) -> None:
    """A run resumed on another machine goes on alike; but baseline has no FMA for exponentials."""
    best, other = results(None)
    if SETS.index(isa) >= SETS.index(best):
        pytest.skip(f"this processor's best is {best}")
    _, one = results(isa)
    without_exponentials = ("mse", "topk", "optimizer")
    compared = [name for name in one if isa != "baseline" or name.startswith(without_exponentials)]
    assert len(compared) > 80
    assert [name for name in compared if not same_bits(one[name], other[name])] == []
