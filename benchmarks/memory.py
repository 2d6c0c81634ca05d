"""``python -m benchmarks memory``: what a step keeps of its forward passes for the backward ones.

Activations are most of what training needs beside weights and states. A step of SGD or SAM keeps
those of the whole batch; K-SAM's selection pass keeps none, and its two gradients those of k
samples. What is counted: the bytes of the storages that autograd saves, each once, at their peak in
a step; not the weights or the batch, which are there anyway.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from benchmarks.arguments import number, positive_int, results_folder
from benchmarks.environment import describe_environment
from benchmarks.errors import UsageError
from benchmarks.train.models import build_image_model
from ksam import KSAM, SAM, SharpnessAware, cross_entropy
from ksam.selection import subset_size

Batch = dict[str, Tensor]
Step = Callable[[Batch], object]

_SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
_MICRO_BATCH = 16
_SMALLEST_K = 1 / 3
_MODELS = {"resnet18": "ResNet-18", "vit": "a small ViT"}


class Counter:
    """Counts the bytes of the storages that autograd holds, each once."""

    def __init__(self, present: list[Tensor]) -> None:
        """``present``: tensors that are there anyway."""
        self.now = self.most = 0
        # By place in memory. What is there anyway has one holder that never lets go.
        self._holders = {tensor.untyped_storage().data_ptr(): 1 for tensor in present}

    def pack(self, tensor: Tensor) -> Held:
        """The pack hook of ``saved_tensors_hooks``: what the graph holds in place of the tensor."""
        return Held(tensor, self)

    def add(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self._holders[place] = self._holders.get(place, 0) + 1
        if self._holders[place] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self._holders[place] -= 1
        if self._holders[place] == 0:
            del self._holders[place]
            self.now -= storage.nbytes()


class Held:
    """What a graph has in place of a tensor that it saves."""

    def __init__(self, tensor: Tensor, counter: Counter) -> None:
        self.tensor, self._counter = tensor, counter
        counter.add(tensor.untyped_storage())

    def __del__(self) -> None:
        self._counter.remove(self.tensor.untyped_storage())


def _sgd(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), **_SGD)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ours(make: Callable[[nn.Module], SharpnessAware]) -> Callable[[nn.Module], Step]:
    def build(model: nn.Module) -> Step:
        optimizer = make(model)
        return lambda batch: optimizer.step(lambda b: cross_entropy(model(b["x"]), b["y"]), batch)

    return build


def _ksam(k: float, micro_batch_size: int | None = None) -> Callable[[nn.Module], Step]:
    return _ours(
        lambda model: KSAM(
            model.parameters(), torch.optim.SGD, model=model, k=k,
            micro_batch_size=micro_batch_size, **_SGD,
        )
    )  # fmt: skip


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "SGD": _sgd,
    "SAM": _ours(lambda model: SAM(model.parameters(), torch.optim.SGD, model=model, **_SGD)),
    "K-SAM, k=1/2": _ksam(1 / 2),
    "K-SAM, k=1/3": _ksam(_SMALLEST_K),
    f"K-SAM, k=1/3, micro-batches of {_MICRO_BATCH}": _ksam(_SMALLEST_K, _MICRO_BATCH),
}


@dataclass(frozen=True)
class Row:
    """What a method keeps: bytes at the peak of a step, and how many times SGD's that is."""

    model: str
    samples: int
    method: str
    bytes_kept: int
    over_sgd: float


def bytes_kept(model: nn.Module, build: Callable[[nn.Module], Step], batch: Batch) -> int:
    """The most bytes that autograd holds in the method's second step: the first makes states."""
    step = build(model)
    step(batch)
    counter = Counter([*model.parameters(), *model.buffers(), *batch.values()])
    with saved_tensors_hooks(counter.pack, lambda held: held.tensor):
        step(batch)
    return counter.most


def measure(name: str, samples: int, side: int) -> list[Row]:
    """All methods with a model and random images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, side, side, generator=generator)
    batch = {"x": x, "y": torch.arange(samples) % 10}
    rows: list[Row] = []
    for method, build in METHODS.items():
        torch.manual_seed(0)
        kept = bytes_kept(build_image_model(name, 3, 10, side), build, batch)
        of_sgd = rows[0].bytes_kept if rows else kept
        rows.append(Row(_MODELS[name], samples, method, kept, kept / of_sgd))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `memory` to `parser`."""
    parser.add_argument(
        "--samples", type=positive_int, default=96, metavar="N", help="of a batch; default: 96"
    )
    # The ViT cuts an image into 8 x 8 patches.
    side = number(int, lambda n: n >= 8 and n % 8 == 0, "a multiple of 8")
    parser.add_argument(
        "--side", type=side, default=32, metavar="N", help="of an image, in pixels; default: 32"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/memory"), metavar="DIR",
        help="folder for results (default: runs/memory)",
    )  # fmt: skip


def _check_sizes(samples: int, side: int) -> None:
    """Raise UsageError where BatchNorm would have one value per channel, on which it cannot train:
    in ResNet-18's last stage, a channel has (side / 8)^2 values per sample."""
    if side == 8 and subset_size(_SMALLEST_K, samples) < 2:
        raise UsageError(
            f"--samples {samples}: at --side 8 BatchNorm needs two samples in every pass, and "
            "K-SAM with k=1/3 would select one; use 5 samples or more, or a larger side"
        )


def run(args: argparse.Namespace) -> None:
    """Print a table, and write it as JSON."""
    _check_sizes(args.samples, args.side)
    with results_folder(args.out):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name in _MODELS:
        rows += measure(name, args.samples, args.side)
        for row in rows[-len(METHODS) :]:
            mib = row.bytes_kept / 2**20
            print(
                f"{row.model:<12} {row.method:<40} {mib:8.1f} MiB  {row.over_sgd:.2f}", flush=True
            )
    found = {**describe_environment(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
    (args.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
