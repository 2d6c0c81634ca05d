"""``topk_indices`` of more losses than one block or program takes."""

from __future__ import annotations

import pytest
import torch

from ksam_kernels import topk_indices
from tests.helpers import FLOATS, any_bits
from tests.topk.test_topk import check, make

MANY = 34_567  # above 32,768, which one program of the Triton kernels takes


@pytest.mark.parametrize("kind", ["ties", "all equal", "any bits", "denormals"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_losses(backend: str, dtype: torch.dtype, kind: str) -> None:
    losses = make(kind, MANY, dtype)
    for k in (1, MANY // 3, MANY):
        check(losses, k)


def test_many_strided_losses(backend: str) -> None:
    check(torch.randn(2 * MANY)[::2], MANY // 2)


@pytest.fixture
def few_programs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs of the Triton kernels, so that each has several blocks of losses, as if there
    were 6 million losses. Other backends have nothing to change."""
    if backend == "triton-interpreter":
        from ksam_kernels.topk import triton as topk

        for name, value in {"ONE_PROGRAM": 0, "BLOCK": 256, "MOST_PROGRAMS": 4}.items():
            monkeypatch.setattr(topk, name, value)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("size", [1, 257, 3000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_programs_of_several_blocks(backend: str, dtype: torch.dtype, size: int) -> None:
    for losses in (any_bits((size,), dtype), torch.randint(0, 3, (size,)).to(dtype)):
        for k in sorted({1, (size + 2) // 3, size}):
            check(losses, k)


@pytest.mark.usefixtures("few_programs")
def test_the_same_indices_again(backend: str) -> None:
    losses = torch.randint(0, 4, (3000,)).float()
    first = topk_indices(losses, 1000)
    assert torch.equal(topk_indices(losses, 1000), first)
