"""From the clock to the report of a GPU run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import host, kernels, report, training
from benchmarks.gpu.part import Context, PartFile
from benchmarks.timing import Plan, Quartiles
from benchmarks.train.models import build_image_model
from tests.benchmarks.clock import Clock, a_case, rounds

CPU = torch.device("cpu")


def test_gpu_rows_are_each_contestants_own(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival takes twice ksam's time, the copy of the same size half of it but in one round."""
    copying = clock.takes(*[0.25] * 2, *[0.75] * 2, *[0.25] * 2)  # two inputs, three rounds
    monkeypatch.setattr(
        kernels, "_copies", lambda _, count, __: lambda: [copying() for _ in range(count)]
    )
    case = a_case(clock.takes(0.5), clock.takes(1.0))
    ours, other = kernels.measure(case, CPU, rounds(3), 1e4)
    assert (ours["microseconds"]["median"], other["microseconds"]["median"]) == (5e5, 1e6)
    assert (ours["ratio"], other["ratio"]) == (1, 2)
    assert ours["share_of_copy"] == pytest.approx(0.2)
    assert ours["share_of_equal_copy"] == pytest.approx(0.5)


def test_gpu_copy_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 copies of 1024 float32 numbers, read and written, in 2 seconds."""
    monkeypatch.setattr(kernels, "seconds_of", lambda _, times, __: times / 2)
    found = kernels.copy_bandwidth(Context(CPU, tmp_path, dry_run=True))
    assert found == Quartiles(*[4 * 2 * 4096 / 2.0] * 3)


def test_host_times(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth more rounds come first, and do not count."""
    monkeypatch.setattr(host, "Quartiles", SimpleNamespace(of=list))
    calls = {"a": clock.takes(9.0, *[1.0] * 10), "b": clock.takes(9.0, *[2.0] * 10)}
    found = host.microseconds(calls, 10, CPU)
    assert found == {"a": [1e6] * 10, "b": [2e6] * 10, "together": [3e6] * 10}


@pytest.mark.parametrize("dry_run", [False, True])
def test_only_dry_runs_make_few_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    case, workload = a_case(torch.abs, torch.abs), SimpleNamespace(label="ResNet-8")
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_, **__: iter([case]))
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: Quartiles.of([1e9]))
    monkeypatch.setattr(training, "workloads", lambda **_: iter([workload]))
    context = Context(CPU, tmp_path, dry_run=dry_run)
    seen: list[Plan] = []
    for part, module in (("kernels", kernels), ("training", training)):
        monkeypatch.setattr(module, "measure", lambda _, __, plan, *___: seen.append(plan) or {})
        module.run(context, PartFile(part, context))
    name = "_DRY_PLAN" if dry_run else "_PLAN"
    assert seen == [getattr(kernels, name), getattr(training, name)]


def test_training_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"SGD": [1.0, 2.0, 1.0], "SAM": [2.0, 8.0, 3.0]}
    monkeypatch.setattr(training, "_times", lambda *_: times)
    found = training.measure(None, CPU, None, {})  # type: ignore[arg-type]
    assert found["SAM"]["milliseconds"]["median"] == 3000
    assert found["SAM"]["over SGD"]["median"] == 3  # of 2, 4 and 3
    assert found["SGD"]["over SGD"]["median"] == 1


def test_training_times_are_of_one_step(clock: Clock) -> None:
    times = training._rounds({"SGD": clock.takes(2.0)}, rounds(2), CPU)
    assert times == {"SGD": [2.0] * 2}


def test_the_first_training_steps_do_not_count(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In them, libraries choose their algorithms."""
    slow = [9.0] * training._STEPS
    methods = {name: lambda *_: clock.takes(*slow, *[1.0] * 12) for name in training.METHODS}
    monkeypatch.setattr(training, "METHODS", methods)
    monkeypatch.setattr(training, "_IN_GRAPHS", ())
    workload: Any = None
    times = training._times(workload, CPU, rounds(2), {})
    assert times == {name: [1.0] * 2 for name in training.METHODS}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_steps_make_the_passes_that_they_are_named_after(bfloat16: bool) -> None:
    """Samples of every forward pass, all in one precision."""
    passes: list[tuple[int, torch.dtype]] = []

    def build() -> nn.Module:
        model = build_image_model("resnet8", 3, 10)
        model.register_forward_hook(lambda *args: passes.append((len(args[2]), args[2].dtype)))
        return model

    workload = training.Workload("ResNet-8", build, 12, 8, 10, bfloat16)
    found = {}
    for name, make in training.METHODS.items():
        step = make(workload, CPU)
        step()
        passes.clear()
        step()
        found[name] = [count for count, _ in passes]
        assert {d for _, d in passes} == {torch.bfloat16 if bfloat16 else torch.float32}, name
    assert found == {
        "SGD": [12], "SAM, a loop": [12, 12], "SAM": [12, 12], "K-SAM, k=1/2": [12, 6, 6],
        "K-SAM, k=1/3": [12, 4, 4],
    }  # fmt: skip


def test_only_the_loop_updates_batchnorm_in_more_than_one_pass() -> None:
    """KSAM knows its model, as the documentation has it: what that costs belongs to the step."""
    models: list[nn.Module] = []

    def build() -> nn.Module:
        models.append(build_image_model("resnet8", 3, 10))
        return models[-1]

    workload = training.Workload("ResNet-8", build, 12, 8, 10, bfloat16=False)
    found = {}
    for name, make in training.METHODS.items():
        make(workload, CPU)()
        counts = [b for n, b in models[-1].named_buffers() if n.endswith("num_batches_tracked")]
        found[name] = {int(count) for count in counts}
    assert found == {name: {2} if name == "SAM, a loop" else {1} for name in training.METHODS}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_sgd_is_fused_on_a_gpu(kind: str) -> None:
    workload: Any = SimpleNamespace(model=lambda _: nn.Linear(2, 2), batch=lambda _: {})
    optimizer, _ = training._fused_sgd(workload, SimpleNamespace(type=kind))  # type: ignore[arg-type]
    assert optimizer.defaults["fused"] is (kind == "cuda")


def test_every_input_of_the_pool_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a GPU's cache would hold the one that all calls read."""
    monkeypatch.setattr(kernels, "pool_size", lambda *_: 3)
    seen: dict[str, list[int]] = {"ours": [], "other": []}

    def noting(name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            seen[name].append(int(x))
            return torch.zeros(1)

        return run

    numbers = itertools.count()
    case = dataclasses.replace(
        a_case(noting("ours"), noting("other")), make_input=lambda: (torch.tensor(next(numbers)),)
    )
    kernels.measure(case, CPU, rounds(2), 1e9)
    assert seen["ours"][-6:] == seen["other"][-6:] == [0, 1, 2] * 2


def test_contestants_take_turns_at_being_first(clock: Clock) -> None:
    order: list[str] = []
    contestants = {
        name: kernels.Timed(lambda name=name: order.append(name), "cpu", 1) for name in "abc"
    }
    kernels.rounds_of(contestants, 1, rounds(3), CPU)
    assert "".join(order) == "abcbcacab"


def test_the_report_shows_medians_and_names_its_shares() -> None:
    microseconds = {"q25": 1.0, "median": 2.0, "q75": 4.0}
    row = {"microseconds": microseconds, "share_of_copy": 0.4, "share_of_equal_copy": 0.5}
    assert report._figures(row) == "2.0 [1.0-4.0] | 40% | 50%"


def test_the_report_shows_medians_of_training_steps() -> None:
    milliseconds = {"q25": 10.0, "median": 20.0, "q75": 40.0}
    steps = {"SAM": {"milliseconds": milliseconds, "over SGD": {"q25": 1.5, "median": 2.0}}}
    found = {"training": {"workloads": {"ResNet-8": steps}}}
    assert "| ResNet-8 | 20.00 (2.00) |" in report._training(found)
