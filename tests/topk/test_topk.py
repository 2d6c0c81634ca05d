"""Contract of ``topk_indices``: which indices, in which order, and what it refuses."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch import Tensor

from ksam_kernels import topk_indices
from tests.helpers import FLOATS, any_bits, bits

SIZES = (1, 2, 63, 64, 65, 1000, 4095, 4096, 4097)


def expected(losses: Tensor, k: int) -> list[int]:
    """NaN first, then by value downwards (Python has -0.0 == 0.0), then by index; ascending."""
    values = losses.tolist()
    order = sorted(
        range(len(values)),
        key=lambda i: (0, 0.0, i) if math.isnan(values[i]) else (1, -values[i], i),
    )
    return sorted(order[:k])


def check(losses: Tensor, k: int) -> None:
    before = bits(losses)
    indices = topk_indices(losses, k)
    assert indices.dtype == torch.int64
    assert indices.shape == (k,)
    assert indices.tolist() == expected(losses, k)
    assert torch.equal(bits(losses), before)


def make(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    if kind == "normal":
        return torch.randn(size).to(dtype)
    if kind == "ties":
        return torch.randint(0, 3, (size,)).to(dtype)
    if kind == "all equal":
        return torch.full((size,), 1.5, dtype=dtype)
    if kind == "any bits":
        return any_bits((size,), dtype)
    if kind == "one nan":
        losses = torch.rand(size).to(dtype)
        losses[size // 2] = float("nan")
        return losses
    if kind == "denormals":  # a backend that flushes them to zero would tie them all
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return torch.randint(0, 50, (size,)).to(dtype) * tiny
    special = [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0]
    return torch.tensor(special, dtype=dtype)[torch.randint(0, len(special), (size,))]


KINDS = ("normal", "ties", "all equal", "any bits", "one nan", "denormals", "special")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_k_largest_lowest_index_first_and_ascending(
    backend: str, dtype: torch.dtype, size: int
) -> None:
    for kind in KINDS:
        losses = make(kind, size, dtype)
        for k in sorted({1, max(1, size // 3), size}):
            check(losses, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_small_batches_with_values_from_a_tiny_set(backend: str, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    tiny = torch.finfo(dtype).smallest_normal / 2
    values = [0.0, -0.0, 1.0, -1.0, tiny, -tiny, float("nan"), float("inf"), -float("inf")]
    for _ in range(200):
        size = rng.randint(1, 12)
        losses = torch.tensor(rng.choices(values, k=size), dtype=dtype)
        check(losses, rng.randint(1, size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_and_offset_losses(backend: str, dtype: torch.dtype) -> None:
    wide = torch.randn(131).to(dtype)
    wide[1::2] = float("nan")  # reading the gaps would choose them
    for view in (wide[::2], wide[2::4], wide[4::2]):
        check(view, 7)
    check(torch.tensor(1.0, dtype=dtype).expand(9), 4)


def test_negative_zero_equals_positive_zero(backend: str) -> None:
    losses = torch.tensor([-0.0, 0.0, -1.0])
    assert topk_indices(losses, 1).tolist() == [0]


@pytest.mark.parametrize("payload", [0x7FC00000, -0x00400000, 0x7F800001], ids=hex)
def test_every_nan_counts_as_largest(backend: str, payload: int) -> None:
    losses = torch.tensor([float("inf"), 0.0, 1.0])
    losses.view(torch.int32)[1] = payload
    assert losses[1].isnan()
    assert topk_indices(losses, 1).tolist() == [1]


def test_float64_losses_are_compared_in_float64(backend: str) -> None:
    losses = torch.tensor([1.0, 1.0 + 2**-50, 1.0 - 2**-50], dtype=torch.float64)
    assert topk_indices(losses, 1).tolist() == [1]


@pytest.mark.parametrize("size", [1000, 4097])
def test_the_set_is_that_of_a_stable_descending_sort(backend: str, size: int) -> None:
    losses = any_bits((size,), torch.float32)
    order = torch.sort(losses.cpu(), stable=True, descending=True).indices  # GPUs' sort NaN by bits
    assert torch.equal(topk_indices(losses, size // 3).cpu(), order[: size // 3].sort().values)


def test_repeated_calls_give_the_same_indices(backend: str) -> None:
    losses = torch.randint(0, 4, (4097,)).float()
    first = topk_indices(losses, 1000)
    assert all(torch.equal(topk_indices(losses, 1000), first) for _ in range(5))


def test_losses_that_require_grad_are_ranked_too(backend: str) -> None:
    losses = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    indices = topk_indices(losses, 2)
    assert indices.tolist() == [1, 2]
    assert not indices.requires_grad


@pytest.mark.parametrize("k", [0, -1, 4, 10**15, 2**63])
def test_k_outside_one_to_batch_size_raises(backend: str, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\].*got {k}$"):
        topk_indices(torch.zeros(3), k)


def test_no_losses_raise(backend: str) -> None:
    with pytest.raises(ValueError, match=r"for 0 losses, got 1"):
        topk_indices(torch.zeros(0), 1)


@pytest.mark.parametrize("k", [True, 1.0, "1", torch.tensor(1)], ids=lambda k: type(k).__name__)
def test_a_k_that_is_no_int_raises(backend: str, k: object) -> None:
    with pytest.raises(TypeError, match=re.escape(f"k must be an int, got {k!r}")):
        topk_indices(torch.zeros(3), k)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (2, 3), (1, 3)], ids=str)
def test_losses_of_another_rank_raise(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="losses must be one-dimensional, got shape"):
        topk_indices(torch.zeros(shape), 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_losses_of_another_dtype_raise(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"losses must be float32.*got {dtype}"):
        topk_indices(torch.zeros(3, dtype=dtype), 1)


def test_losses_that_are_no_tensor_raise(backend: str) -> None:
    with pytest.raises(TypeError, match="losses must be a tensor, got list"):
        topk_indices([1.0, 2.0], 1)  # type: ignore[arg-type]
