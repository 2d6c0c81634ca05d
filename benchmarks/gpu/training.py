"""Whole training steps, forward and backward passes included: SGD, SAM and K-SAM side by side.

The claim that K-SAM rests on is about these: M + 6k forward passes over a sample where SGD has 3M,
so the same cost at k = M/3, as long as a third of the batch still fills the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.capture import capture
from benchmarks.gpu.kernels import Timed, rounds_of
from benchmarks.gpu.part import Context, PartFile, reason
from benchmarks.timing import Plan, Quartiles, ratios
from benchmarks.train.models import build_image_model
from ksam import KSAM, cross_entropy

_PLAN = Plan(rounds=15, seconds=4.0, few_rounds=5, max_seconds=9.0, max_rounds=60)
_DRY_PLAN = Plan(rounds=1, seconds=0, few_rounds=1, max_seconds=1)
_STEPS = 3  # of a method in a round
_SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
_RHO = 0.05

Batch = dict[str, Tensor]
Step = Callable[[], object]
Failures = dict[str, str]


@dataclass(frozen=True)
class Workload:
    """A model, a batch of random images, and the precision of its arithmetic."""

    name: str
    build: Callable[[], nn.Module]
    samples: int
    side: int
    classes: int
    bfloat16: bool

    @property
    def label(self) -> str:
        """The workload as tables name it."""
        precision = "bfloat16 autocast" if self.bfloat16 else "float32"
        return f"{self.name}, {self.samples} x 3x{self.side}x{self.side}, {precision}"

    def model(self, device: torch.device) -> nn.Module:
        """The model, in the memory format that convolutions are fastest in."""
        torch.default_generator.manual_seed(0)
        return self.build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def batch(self, device: torch.device) -> Batch:
        """The same one for every step: its values do not change what a step costs."""
        return _random_batch(self.samples, self.side, self.classes, device)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Context of a forward pass; a cache of weights would not outlive a graph's capture."""
        if not self.bfloat16:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@functools.lru_cache(maxsize=1)
def _random_batch(samples: int, side: int, classes: int, device: torch.device) -> Batch:
    """A batch drawn on the CPU, as weights are: a failed capture spoils the GPU's generator."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, side, side, generator=generator).to(device)
    y = torch.randint(classes, (samples,), generator=generator).to(device)
    return {"x": x.contiguous(memory_format=torch.channels_last), "y": y}


def workloads(*, tiny: bool) -> Iterator[Workload]:
    """ResNet-18 on small images and, where torchvision is there, ResNet-50 on large ones."""
    if tiny:
        yield Workload(
            "ResNet-8", lambda: build_image_model("resnet8", 3, 10), 12, 8, 10, bfloat16=False
        )
        return
    for bfloat16 in (True, False):
        yield Workload(
            "ResNet-18", lambda: build_image_model("resnet18", 3, 10), 1024, 32, 10, bfloat16
        )
    try:
        from torchvision.models import resnet50
    except ImportError:
        return
    yield Workload("ResNet-50", resnet50, 384, 224, 1000, bfloat16=True)


def _fused_sgd(workload: Workload, device: torch.device) -> tuple[torch.optim.SGD, Step]:
    """PyTorch's fastest SGD over its own model, and what leaves the batch's gradient in that."""
    model, batch = workload.model(device), workload.batch(device)
    optimizer = torch.optim.SGD(model.parameters(), **_SGD, fused=device.type == "cuda")

    def gradient() -> None:
        optimizer.zero_grad()
        with workload.precision(device):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()  # type: ignore[no-untyped-call]

    return optimizer, gradient


def _sgd(workload: Workload, device: torch.device) -> Step:
    """The loop anyone would write."""
    optimizer, gradient = _fused_sgd(workload, device)

    def step() -> None:
        gradient()
        optimizer.step()

    return step


def _sam(workload: Workload, device: torch.device) -> Step:
    """SAM as it is usually written: a loop over parameters around the base optimizer."""
    optimizer, gradient = _fused_sgd(workload, device)
    params = optimizer.param_groups[0]["params"]

    @torch.no_grad()
    def climb() -> list[Tensor]:
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.stack([g.norm(p=2) for g in grads]).norm(p=2)
        kept = [p.clone() for p in params]
        for p, g in zip(params, grads, strict=True):
            p.add_(g * (_RHO / (norm + 1e-12)))
        return kept

    def step() -> None:
        gradient()
        kept = climb()
        gradient()
        for p, old in zip(params, kept, strict=True):
            p.data = old
        optimizer.step()

    return step


def _ksam(k: float, workload: Workload, device: torch.device) -> Step:
    model, batch = workload.model(device), workload.batch(device)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, rho=_RHO, k=k, model=model, **_SGD)

    def losses(samples: Batch) -> Tensor:
        with workload.precision(device):
            logits = model(samples["x"])
        return cross_entropy(logits, samples["y"])

    return lambda: optimizer.step(losses, batch)


METHODS: dict[str, Callable[[Workload, torch.device], Step]] = {
    "SGD": _sgd,
    "SAM, a loop": _sam,
    "SAM": lambda workload, device: _ksam(1.0, workload, device),
    "K-SAM, k=1/2": lambda workload, device: _ksam(1 / 2, workload, device),
    "K-SAM, k=1/3": lambda workload, device: _ksam(1 / 3, workload, device),
}


#: Also replayed from a CUDA graph, where no host keeps the GPU waiting.
_IN_GRAPHS = ("SGD", "K-SAM, k=1/3")


def _graphs(workload: Workload, device: torch.device, failures: Failures) -> dict[str, Step]:
    """Captured steps, as far as the memory goes."""
    graphs: dict[str, Step] = {}
    for name in _IN_GRAPHS:
        label = f"{name}, graph"
        try:
            graphs[label] = capture(METHODS[name](workload, device), device)
        except RuntimeError as error:
            failures[f"{workload.label}, {label}"] = reason(error)
    return graphs


def _rounds(steps: dict[str, Step], plan: Plan, device: torch.device) -> dict[str, list[float]]:
    contestants = {
        name: Timed(step, "a step", passes=1, replays=_STEPS) for name, step in steps.items()
    }
    return rounds_of(contestants, 1, plan, device)


def _times(
    workload: Workload, device: torch.device, plan: Plan, failures: Failures
) -> dict[str, list[float]]:
    """Seconds of a step of every method. Where those in graphs fail, `failures` says so, and the
    others are timed without them."""
    steps = {name: make(workload, device) for name, make in METHODS.items()}
    for step in steps.values():
        for _ in range(_STEPS):  # libraries choose their algorithms
            step()
    graphs = _graphs(workload, device, failures)
    if graphs:
        try:
            return _rounds({**steps, **graphs}, plan, device)
        except RuntimeError as error:
            failures[f"{workload.label}, rounds with graphs"] = reason(error)
        graphs.clear()  # which frees their memory
    return _rounds(steps, plan, device)


def measure(
    workload: Workload, device: torch.device, plan: Plan, failures: Failures
) -> dict[str, Any]:
    """Milliseconds of a step, and its time over SGD's within rounds in which all take turns."""
    times = _times(workload, device, plan, failures)
    found = {}
    for name, own in times.items():
        cost = Quartiles.of(ratios(own, times["SGD"]))
        milliseconds = Quartiles.of([1e3 * seconds for seconds in own])
        found[name] = {"milliseconds": vars(milliseconds), "over SGD": vars(cost)}
    return found


def run(context: Context, file: PartFile) -> None:
    """Every workload, as far as the time goes."""
    plan = _DRY_PLAN if context.dry_run else _PLAN
    to_do = list(workloads(tiny=context.dry_run))
    left_out = [workload.label for workload in to_do]
    file.results = {"workloads": {}, "failures": {}, "left_out": left_out}
    for workload in to_do:
        if context.seconds_left < 10:
            break
        left_out.remove(workload.label)
        failures: Failures = {}
        try:
            found = measure(workload, context.device, plan, failures)
        except Exception as error:
            failures[workload.label] = reason(error)
        else:
            file.results["workloads"][workload.label] = found
            cells = [
                f"{name} {own['milliseconds']['median']:.2f} ms ({own['over SGD']['median']:.2f})"
                for name, own in found.items()
            ]
            print(f"{workload.label}: {', '.join(cells)}", flush=True)
        for what, why in failures.items():
            print(f"{what}: {why}", flush=True)
        file.results["failures"] |= failures
        file.write(complete=False)
