"""Cases of the top-k room: indices of the third of the batch with the highest losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ksam_kernels as kk
from benchmarks.kernels.case import KSAM, Case, Contestant, stateless

LEGEND = {
    "topk": "torch.topk(losses, k, sorted=False).indices: not ordered, and ties as they come",
    "sort": "torch.sort(losses, stable=True, descending=True).indices[:k].sort(), the contract",
}

Fill = Callable[[int, torch.device], Tensor]

# What losses look like: early in training all alike, later spread out, and tied where they are 0
# or ignored.
_VALUES: dict[str, Fill] = {
    "normal": lambda size, device: torch.randn(size, device=device),
    "uniform": lambda size, device: torch.rand(size, device=device),
    "narrow": lambda size, device: 1 + 3e-5 * torch.rand(size, device=device),
    "all equal": lambda size, device: torch.ones(size, device=device),
}

_SIZES = (64, 128, 256, 1000, 4096, 16384, 65536, 1 << 20)
_SIZES_OF_OTHER_VALUES = (128, 4096, 65536, 1 << 20)


def floor_bytes(size: int, k: int) -> int:
    """Every float32 loss read once, k int64 indices written."""
    return 4 * size + 8 * k


def _topk(losses: Tensor, k: int) -> Tensor:
    return torch.topk(losses, k, sorted=False).indices


def _sort(losses: Tensor, k: int) -> Tensor:
    return torch.sort(losses, stable=True, descending=True).indices[:k].sort().values


def assert_same_losses(
    indices: Tensor, expected: Tensor, contestant: Contestant, input: Any
) -> None:
    """The same losses were chosen; the indices must be the same but for `torch.topk`'s ties."""
    losses, _ = input
    if contestant.name != "topk":
        assert torch.equal(indices, expected), "other indices"
        return
    assert len(set(indices.tolist())) == expected.numel(), "repeated or missing indices"
    chosen, best = (losses[i].sort().values for i in (indices, expected))
    assert torch.equal(chosen, best), "the losses chosen are not the largest"


def case(values: str, size: int, device: torch.device) -> Case:
    """Selection of a third of `size` losses of a kind named in `_VALUES`."""
    k = size // 3
    return Case(
        room="topk",
        operation="topk_indices",
        extra=values,
        shape=f"{size}, k={k}",
        dtype="float32",
        floor_bytes=floor_bytes(size, k),
        operators=("topk_indices",),
        make_input=lambda: (_VALUES[values](size, device), k),
        contestants=[
            stateless(KSAM, kk.topk_indices),
            stateless("topk", _topk),
            stateless("sort", _sort),
        ],
        quick=size in (128, 4096),
        assert_same=assert_same_losses,
    )


def cases(device: torch.device) -> Iterator[Case]:
    """All cases of the room."""
    for size in _SIZES:
        yield case("normal", size, device)
    for values in ("uniform", "narrow", "all equal"):
        for size in _SIZES_OF_OTHER_VALUES:
            yield case(values, size, device)
