"""From the clock to the tables of kernels: whose time it is, of what, and what it is divided by."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import environment
from benchmarks.kernels import compact, perturb, plot, run, topk
from benchmarks.kernels.case import Case
from benchmarks.kernels.measure import Row, figures_of, measure_case
from benchmarks.kernels.report import KernelResults, summary_lines
from benchmarks.kernels.sam import BASES, CONTESTANTS, Start
from benchmarks.kernels.timing import DEFAULT_PLAN, QUICK_PLAN, copy_bandwidth, time_in_turns
from benchmarks.timing import Plan, Quartiles, seconds_for
from tests.benchmarks.clock import Clock, a_case, rounds
from tests.benchmarks.test_kernels_end_to_end import make_row
from tests.helpers import read_rows

CPU = torch.device("cpu")


def test_times_are_those_of_one_call(clock: Clock) -> None:
    """However many calls make up a sample."""
    runs = {"fast": clock.takes(30e-6), "slow": clock.takes(1e-3)}
    times = time_in_turns(runs, [0], rounds(2), CPU)
    assert times == {"fast": pytest.approx([30e-6] * 2), "slow": pytest.approx([1e-3] * 2)}


def test_a_copy_reads_and_writes_and_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 8.0])
    monkeypatch.setattr("benchmarks.kernels.timing.seconds_for", lambda *_: next(seconds))
    assert copy_bandwidth(CPU, megabytes=1, rounds=3) == 2 * (1 << 20) / 2.0


def test_the_clock_is_read_when_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("benchmarks.timing.synchronize", lambda _: seen.append("idle"))
    monkeypatch.setattr("time.perf_counter", lambda: float(seen.append("clock") or 0))
    seconds_for(lambda _: seen.append("run"), [0, 1], CPU)
    assert seen == ["idle", "clock", "run", "run", "idle", "clock"]


def test_figures_are_of_times_and_of_ratios_within_rounds() -> None:
    case = a_case(torch.abs, torch.abs)
    figures = figures_of(case, [2.0, 8.0, 3.0], [1.0, 16.0, 1.0], bandwidth=100.0)
    assert figures == {
        "microseconds": Quartiles(2.5e6, 3e6, 5.5e6),
        "rounds": 3,
        "share_of_copy": pytest.approx(1000 / 3.0 / 100.0),
        "ratio": 2.0,
    }


def test_rows_are_each_contestants_own(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([100, 130])
    monkeypatch.setattr("benchmarks.kernels.measure.preemptions", lambda: next(taken))
    case, plan = a_case(clock.takes(0.5), clock.takes(1.0)), rounds(4)
    ours, other = measure_case(case, CPU, plan, bandwidth=1e4, quick=True)
    assert (ours.microseconds, other.microseconds) == (Quartiles(*[5e5] * 3), Quartiles(*[1e6] * 3))
    assert (ours.ratio, other.ratio) == (1, 2)
    assert (ours.share_of_copy, other.share_of_copy) == pytest.approx((0.2, 0.1))
    # Two calls of each warm up, four are timed: 30 in 9 seconds.
    assert ours.preemptions_per_s == other.preemptions_per_s == pytest.approx(30 / 9)


@pytest.mark.parametrize(("quick", "plan"), [(False, DEFAULT_PLAN), (True, QUICK_PLAN)])
def test_only_quick_runs_make_few_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool, plan: Plan
) -> None:
    seen: list[Plan] = []

    def measure_case(_: Case, __: torch.device, plan: Plan, *___: float, quick: bool) -> list[Row]:
        seen.append(plan)
        return [make_row("ksam", 1.0)]

    monkeypatch.setattr(run, "measure_case", measure_case)
    settings = run.Settings(("topk",), quick, "auto", tmp_path)
    assert list(run._measure_section("topk", settings, CPU, 1e10))
    assert set(seen) == {plan}


def test_preemptions_are_the_switches_that_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = SimpleNamespace(ru_nivcsw=7, ru_nvcsw=100)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    assert environment.preemptions() == 7


def test_the_cases_that_ksam_loses_are_counted() -> None:
    rows = [make_row("ksam", 1.0), *(make_row("sort", ratio) for ratio in (2.0, 0.5, 0.6))]
    assert summary_lines(rows) == ["sort: ksam is slower in 2 of 3 cases"]


def test_the_csv_shows_the_figures(tmp_path: Path) -> None:
    with KernelResults(tmp_path / "results.csv", CPU) as file:
        file.write([make_row("sort", 2.5)])
    [row] = read_rows(tmp_path / "results.csv")
    names = ("q25_us", "median_us", "q75_us", "share_of_copy", "ratio")
    assert [float(row[name]) for name in names] == [2.0, 2.4, 3.0, 0.5, 2.5]


def test_the_plot_shows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    rows = [
        dataclasses.replace(make_row(name, ratio), shape=shape)
        for shape, name, ratio in [
            ("64", "ksam", 1.0), ("64", "topk", 2.0), ("64", "sort", 3.0),
            ("128", "ksam", 1.0), ("128", "topk", 0.5), ("128", "sort", None),
        ]
    ]  # fmt: skip
    plot.plot_ratios(tmp_path / "ratios.png", rows, "title")
    (axes,) = drawn[0].axes
    found = {marks.get_label(): marks.get_offsets().tolist() for marks in axes.collections}
    assert found == {"topk": [[2, 0], [0.5, 1]], "sort": [[3, 0]]}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.split()[1] for label in labels] == ["64", "128"]


@pytest.mark.parametrize(
    ("name", "option"),
    [("davda54", "foreach"), ("foreach", "foreach"), ("copy+fused", "fused"),
     ("swap+fused", "fused")],
)  # fmt: skip
@pytest.mark.parametrize("base", BASES)
def test_rivals_use_the_base_that_the_legend_says(name: str, option: str, base: str) -> None:
    step = CONTESTANTS[name](Start.random([(3,)], BASES[base], CPU), BASES[base])
    assert step.optimizer.defaults[option] is True


def test_floors_of_cases_are_of_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturb, "MODELS", {"ResNet-50": lambda: [(3, 4), (5,), (1000,)]})
    floors = {(case.label, case.dtype): case.floor_bytes / 1017 for case in perturb.cases(CPU)}
    assert floors == {
        ("grad_norm", "float32"): 4, ("perturb_", "float32"): 20,
        ("restore_sgd_", "float32"): 20, ("restore_adam_", "float32"): 28,
        ("restore_sgd_", "bfloat16"): 10, ("restore_adam_", "bfloat16"): 14,
        ("SAM step, SGD", "float32"): 40, ("SAM step, AdamW", "float32"): 48,
        ("SAM step, SGD, adaptive", "float32"): 44,
    }  # fmt: skip
    assert topk.case("normal", 99, CPU).floor_bytes == 4 * 99 + 8 * 33
    labels = compact.case("labels", 99, "99", lambda d: {"y": torch.zeros(99, device=d)}, CPU)
    assert labels.floor_bytes == 33 * (4 + 4 + 8)
