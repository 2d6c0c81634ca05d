"""Cases of the compact room: a third of a batch, gathered from every tensor of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import ksam_kernels as kk
from benchmarks.kernels.case import KSAM, Case, Contestant, Run, size_in_bytes, stateless

LEGEND = {
    "tree_map": "tree_map(lambda t: t[indices], batch)",
    "index_select": "t.index_select(0, indices) for each tensor",
    "out=": "index_select into tensors kept from call to call, so no memory is allocated",
}

Batch = dict[str, Tensor]


def _small_images(device: torch.device) -> Batch:
    return {
        "image": torch.randn(512, 3, 32, 32, device=device),
        "label": torch.randint(10, (512,), device=device),
        "mask": torch.rand(512, 196, device=device) < 0.75,
    }


def _large_images(device: torch.device) -> Batch:
    return {
        "image": torch.randn(64, 3, 224, 224, device=device),
        "label": torch.randint(1000, (64,), device=device),
        "mask": torch.rand(64, 196, device=device) < 0.75,
    }


def _tokens(device: torch.device) -> Batch:
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: torch.randint(30000, (32, 128), device=device) for name in names}
    return {**batch, "labels": torch.randint(2, (32,), device=device)}


# name: (samples, shape as the report shows it, how to make a batch)
_BATCHES: dict[str, tuple[int, str, Callable[[torch.device], Batch]]] = {
    "images": (512, "512x3x32x32", _small_images),
    "large images": (64, "64x3x224x224", _large_images),
    "tokens": (32, "3 of 32x128", _tokens),
}


def floor_bytes(batch: Batch, k: int) -> int:
    """k rows of every tensor read and written once, k int64 indices read once."""
    samples = next(iter(batch.values())).shape[0]
    return 2 * k * (size_in_bytes(batch) // samples) + 8 * k


def _tree_map(batch: Batch, indices: Tensor) -> Batch:
    rows: Batch = pytree.tree_map(lambda tensor: tensor[indices], batch)
    return rows


def _index_select(batch: Batch, indices: Tensor) -> Batch:
    return {name: tensor.index_select(0, indices) for name, tensor in batch.items()}


def _index_select_out() -> Contestant:
    def start(input: Any) -> Run:
        kept = _index_select(*input)

        def run(input: Any) -> Batch:
            batch, indices = input
            for name, tensor in batch.items():
                torch.index_select(tensor, 0, indices, out=kept[name])
            return kept

        return run

    return Contestant("out=", start)


def case(
    name: str,
    samples: int,
    shape: str,
    make_batch: Callable[[torch.device], Batch],
    device: torch.device,
    *,
    quick: bool = False,
) -> Case:
    """A third of the samples gathered from the batches that `make_batch` makes."""
    k = samples // 3

    def make_input() -> tuple[Batch, Tensor]:
        chosen = torch.randperm(samples, device=device)[:k].sort().values
        return make_batch(device), chosen

    return Case(
        room="compact",
        operation="compact_batch",
        extra=f"{name}, k={k}",
        shape=shape,
        dtype="mixed",
        # Sizes are the same on the meta device, which has no memory.
        floor_bytes=floor_bytes(make_batch(torch.device("meta")), k),
        operators=("compact",),
        make_input=make_input,
        contestants=[
            stateless(KSAM, kk.compact_batch),
            stateless("tree_map", _tree_map),
            stateless("index_select", _index_select),
            _index_select_out(),
        ],
        quick=quick,
    )


def cases(device: torch.device) -> Iterator[Case]:
    """All cases of the room."""
    for name, batches in _BATCHES.items():
        yield case(name, *batches, device, quick=name != "large images")
