"""From the clock to the tables and plots of training."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import Quartiles
from benchmarks.train import loop, study
from benchmarks.train.loop import EpochResult, data_generator, seeded_model, train
from benchmarks.train.methods import Method, make_method
from benchmarks.train.plot import plot_accuracy
from benchmarks.train.report import TrainResults, format_table
from benchmarks.train.step_cost import StepCost, measure_step_costs
from benchmarks.train.steps import make_step, parameter_groups
from benchmarks.train.summary import summarize
from benchmarks.train.workload import LABEL
from tests.benchmarks.clock import Clock
from tests.benchmarks.test_train_loop import RecordingWorkload, make_config
from tests.helpers import read_rows

CPU = torch.device("cpu")


def test_an_epoch_ends_when_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("benchmarks.train.loop.synchronize", lambda _: seen.append("idle"))
    monkeypatch.setattr("time.perf_counter", lambda: float(seen.append("clock") or 0))
    config = make_config()
    list(train(RecordingWorkload(), make_method("sgd", config), config, 0, lambda: None))
    assert seen == ["idle", "clock"] * 4


def test_step_costs_are_ratios_of_steps_on_the_same_batch(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = {"sgd": clock.takes(1.0), "sam": clock.takes(2.0, 3.0, 4.0)}
    batches: list[Any] = []

    def new_step(method: Method, *_: Any) -> Callable[[Any], Any]:
        return lambda batch: (batches.append(batch), takes[method.name]())

    monkeypatch.setattr("benchmarks.train.step_cost._new_step", new_step)
    config = make_config("--timing-rounds", "3")
    methods = [make_method(name, config) for name in ("sgd", "sam")]
    costs = measure_step_costs(RecordingWorkload(), methods, config)
    assert costs["sam"].ratio == Quartiles(2.5, 3.0, 3.5)
    assert (costs["sgd"].milliseconds, costs["sam"].milliseconds) == (1000, 3000)
    assert all(one is other for one, other in zip(batches[::2], batches[1::2], strict=True))


def test_time_accumulates_over_epochs(clock: Clock) -> None:
    config = make_config()
    results = list(
        train(RecordingWorkload(), make_method("sgd", config), config, 0, clock.takes(1.0))
    )
    assert [result.train_seconds for result in results] == [3.0, 6.0]


def test_losses_are_means_over_an_epochs_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    values = itertools.count(1)
    monkeypatch.setattr(
        "benchmarks.train.steps._PlainStep.__call__",
        lambda self, batch: torch.tensor(float(next(values))),
    )
    config = make_config()
    results = train(RecordingWorkload(), make_method("sgd", config), config, 0, lambda: None)
    assert [result.train_loss for result in results] == [2.0, 5.0]  # of 1, 2, 3 and 4, 5, 6


def test_the_rate_ends_at_0_whatever_the_number_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    warmup_cosine = loop.warmup_cosine
    monkeypatch.setattr(
        loop, "warmup_cosine", lambda *args: made.append(warmup_cosine(*args)) or made[-1]
    )
    config = make_config("--equal-cost", "--epochs", "4")
    for name in ("sgd", "sam"):  # four epochs and two
        list(train(RecordingWorkload(), make_method(name, config), config, 0, lambda: None))
        assert made[-1].get_last_lr() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_sgd_is_the_plain_loop(base: str) -> None:
    config = make_config("--base", base, "--weight-decay", "0.01")
    workload = RecordingWorkload()
    model, plain = seeded_model(workload, 0), seeded_model(workload, 0)
    made, step = make_step(make_method("sgd", config), workload, model, config)
    groups = parameter_groups(plain, 0.01)
    optimizer: torch.optim.Optimizer
    if base == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    assert type(made) is type(optimizer)
    for batch in workload.train_batches(32, data_generator(0)):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(batch["image"]), batch[LABEL])
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(step(batch), loss.detach())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_curves_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    config = make_config()
    results = [
        EpochResult("sam", seed, epoch, 10.0 * epoch, 0.5, 0.1 * epoch + 0.02 * seed, 2.0)
        for seed in range(3)
        for epoch in (1, 2)
    ]
    methods = [make_method("sam", config)]
    for over_cost, axis in ((False, "training time [s]"), (True, "cost by count [epochs of SGD]")):
        plot_accuracy(tmp_path / "a.png", config, methods, results, over_cost)
        (axes,) = drawn[-1].axes
        (line,) = axes.lines
        assert line.get_xdata().tolist() == ([2, 4] if over_cost else [10, 20])
        assert line.get_ydata().tolist() == pytest.approx([12, 22])
        assert line.get_label() == "SAM, mean ± sd of 3 runs"
        assert axes.get_xlabel() == axis
        (band,) = axes.collections
        heights = sorted({round(y, 6) for _, y in band.get_paths()[0].vertices})
        assert heights == [10, 14, 20, 24]


def test_a_study_is_drawn_over_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(study, "plot_accuracy", lambda *_, **options: seen.append(options))
    config = dataclasses.replace(make_config("--methods", "sgd"), out=tmp_path)
    with TrainResults(tmp_path / "study.csv", config, "cpu") as file:
        file.write(make_method("sgd", config), EpochResult("sgd", 0, 2, 1.0, 0.5, 0.5))
    study._report(tmp_path / "study.csv", config)
    assert seen == [{"over_cost": True}]


def test_the_table_shows_medians_with_their_quartiles() -> None:
    config = make_config()
    cost = StepCost(Quartiles(1.25, 1.5, 2.75), rounds=3, milliseconds=10.0)
    result = EpochResult("sam", 0, 2, 1.0, 0.5, 0.5)
    summaries = summarize([make_method("sam", config)], [result], {"sam": cost}, 32)
    assert "1.50 [1.25-2.75]" in format_table(config, summaries, 32)


def test_a_loss_that_was_not_finite_in_an_earlier_epoch_counts() -> None:
    config = make_config()
    results = [
        EpochResult("sgd", 0, 1, 1.0, float("nan"), 0.5),
        EpochResult("sgd", 0, 2, 2.0, 0.5, 0.5),
    ]
    [summary] = summarize([make_method("sgd", config)], results, {}, 32)
    assert (summary.runs, summary.non_finite_runs) == (1, 1)


def test_rows_show_the_settings_of_their_run(tmp_path: Path) -> None:
    config = make_config("--lr", "0.3", "--weight-decay", "0.02", "--batch-size", "40")
    method = make_method("ksam", config)
    path = tmp_path / "results.csv"
    with TrainResults(path, config, "a device") as file:
        file.write(method, EpochResult("ksam", 5, 2, 1.5, 0.25, 0.75))
    [row] = read_rows(path)
    shown = ("method", "seed", "epoch", "lr", "weight_decay", "batch_size", "k", "rho", "device")
    assert [row[name] for name in shown] == [
        *("ksam", "5", "2", "0.3", "0.02", "40", str(method.k), str(method.rho), "a device")
    ]
    figures = ("train_seconds", "train_loss", "test_accuracy")
    assert [float(row[name]) for name in figures] == [1.5, 0.25, 0.75]
