"""Every method on the command line, label noise, and the study that runs them in processes."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import build_parser
from benchmarks.train.config import DEFAULT_METHODS, METHODS, TrainConfig, resolve
from benchmarks.train.images import ImageWorkload, load_digits
from benchmarks.train.loop import seeded_model, train
from benchmarks.train.methods import SPECS, make_method, make_step
from benchmarks.train.workload import INDEX, LABEL, with_noise
from ksam import From, OrderedSGD, Representative, SharpnessAware
from tests.helpers import ROOT

CPU = torch.device("cpu")


def config(*arguments: str) -> TrainConfig:
    defaults = ["train", "--epochs", "2", "--batch-size", "32", "--train-samples", "128"]
    return resolve(build_parser(["train"]).parse_args([*defaults, *arguments]))


@pytest.fixture(scope="module")
def workload() -> ImageWorkload:
    return ImageWorkload(load_digits(), "cnn", CPU, 128)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_name_has_a_method() -> None:
    assert set(METHODS) == {"sgd", *SPECS}
    assert METHODS[:3] == DEFAULT_METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(workload: ImageWorkload, name: str) -> None:
    settings = config()
    method = make_method(name, settings)
    results = list(train(workload, method, settings, 0, lambda: None))
    assert [result.epoch for result in results] == [1, 2]
    assert all(result.finite for result in results)
    assert results[-1].train_loss < 1.2 * results[0].train_loss
    assert 0 < results[-1].gradient_cost <= 2


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("sam", 2.0), ("asam", 2.0), ("esam", (4 * 96 + 3 * 48) / 288), ("random-sam", 1.25),
        ("ordered", 1.0), ("msam", 1.0), ("ausam", 1.0), ("ksam", 1.0), ("ksam-auto", 1.0),
        ("ksam-auto-plain", 1.0), ("late-sam", 1.2), ("late-ksam", 1.0), ("nth-sam", 1.2),
        ("stale-ksam", 1 + 1 / 30),
    ],
)  # fmt: skip
def test_theoretical_costs(name: str, cost: float) -> None:
    assert make_method(name, config()).theoretical_cost(96) == pytest.approx(cost, abs=0.02)


def test_options_reach_their_methods(workload: ImageWorkload) -> None:
    settings = config(
        "--asam-rho", "0.7", "--msam-rho", "0.4", "--late", "0.25", "--threshold", "0.5",
        "--budget", "0", "--rho", "0.1",
    )  # fmt: skip

    def build(name: str) -> SharpnessAware:
        model = seeded_model(workload, 0)
        optimizer, _ = make_step(make_method(name, settings), workload, model, settings, seed=3)
        assert isinstance(optimizer, SharpnessAware)
        assert optimizer.seed == 3
        return optimizer

    rho = {name: build(name).param_groups[0]["rho"] for name in ("asam", "msam", "esam")}
    assert rho == {"asam": 0.7, "msam": 0.4, "esam": 0.1}
    assert build("late-sam").when == From(6)  # of 2 x 4 steps
    for name, radius in (("ksam-auto", 0.4), ("ksam-auto-plain", None)):
        auto = build(name)
        assert isinstance(auto.when, Representative)
        assert (auto.when.threshold, auto.when.budget) == (0.5, None)
        assert (auto.scale, auto.statistics) == ("batch", "matched")
        assert (auto.otherwise and auto.otherwise.rho) == radius
    assert build("ksam-auto-matched").scale == "mean"
    assert build("ksam-auto-mean").statistics == "subset"
    assert make_method("msam", settings).rho == 0.4
    assert make_method("ordered", settings).rho is None


def test_ordered_sgd_hears_of_the_accuracy(workload: ImageWorkload) -> None:
    settings = config()
    model = seeded_model(workload, 0)
    optimizer, step = make_step(make_method("ordered", settings), workload, model, settings)
    for batch in workload.train_batches(32, torch.Generator().manual_seed(0)):
        step(batch)
    step.end_epoch()
    assert isinstance(optimizer, OrderedSGD)
    assert 0 < optimizer.q.accuracy < 1  # type: ignore[union-attr]


def test_batches_carry_the_rows_of_their_samples() -> None:
    workload = ImageWorkload(load_digits(), "cnn", CPU)
    labels = torch.full((workload.train_size,), -1)
    for batch in workload.train_batches(64, torch.Generator().manual_seed(0)):
        labels[batch[INDEX]] = batch[LABEL]
    seen = labels >= 0
    assert seen.sum() == 64 * (workload.train_size // 64)
    assert torch.equal(labels[seen], load_digits().train.labels[seen])


def test_label_noise_is_exact_and_leaves_the_test_set_alone() -> None:
    labels = torch.arange(1000) % 10
    noisy = with_noise(labels, 0.2, 10)
    assert int((noisy != labels).sum()) == 200
    assert torch.equal(noisy, with_noise(labels, 0.2, 10))
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert torch.equal(with_noise(labels, 0.0, 10), labels)
    clean = ImageWorkload(load_digits(), "cnn", CPU)
    dirty = ImageWorkload(load_digits(), "cnn", CPU, label_noise=0.5)
    for one, other in zip(clean.test_batches(), dirty.test_batches(), strict=True):
        assert torch.equal(one[LABEL], other[LABEL])


def test_a_vit_trains_from_the_command_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "--model", "vit", "--base", "adamw", "--seeds", 1, "--epochs", 1, "--train-samples", 96,
        "--batch-size", 32, "--methods", "sgd,ksam-auto,msam", "--timing-rounds", 1,
        "--label-noise", 0.2, "--out", tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = read_rows(tmp_path / "results.csv")
    assert [(row["method"], row["rho"]) for row in rows] == [
        ("sgd", ""), ("ksam-auto", "0.05"), ("msam", "0.05"),
    ]  # fmt: skip
    assert "auto K-SAM, k=1/3" in result.out


def test_diagnostics_of_the_first_seed(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "--seeds", 2, "--epochs", 2, "--train-samples", 96, "--batch-size", 32, "--label-noise",
        0.25, "--methods", "sgd,ksam", "--timing-rounds", 0, "--diagnostics", "--out", tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert sorted(path.name for path in tmp_path.glob("diagnostics*")) == [
        "diagnostics-ksam.csv",
        "diagnostics-ksam.png",
    ]
    rows = read_rows(tmp_path / "diagnostics-ksam.csv")
    assert [int(row["step"]) for row in rows] == list(range(6))  # of one seed
    assert {row["sharp"] for row in rows} == {"1.0"}


def test_the_wrong_labels_are_known() -> None:
    noisy = ImageWorkload(load_digits(), "cnn", CPU, train_samples=64, label_noise=0.25)
    clean = ImageWorkload(load_digits(), "cnn", CPU, train_samples=64)
    batches = [next(w.train_batches(64, torch.Generator().manual_seed(0))) for w in (noisy, clean)]
    wrong = batches[0][INDEX][batches[0][LABEL] != batches[1][LABEL]]
    assert wrong.sort().values.tolist() == noisy.wrong.tolist()
    assert len(noisy.wrong) == 16
    assert len(clean.wrong) == 0


def test_the_study_goes_on_where_it_stopped(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = (
        "--epochs", 2, "--train-samples", 96, "--batch-size", 32, "--methods", "sgd,ksam",
        "--processes", 2, "--out", tmp_path,
    )  # fmt: skip
    result = cli(*arguments, "--seeds", 1, command="study")
    assert result.status == 0, result.err
    assert "0 runs complete, 2 to do" in result.out
    assert "K-SAM, k=1/3" in result.out
    path = tmp_path / "study.csv"
    first = read_rows(path)
    assert {(row["method"], row["epoch"]) for row in first} == {
        (method, epoch) for method in ("sgd", "ksam") for epoch in "12"
    }
    # The last epoch of a run is lost, as if it had been cut off.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = [line for line in lines if ",ksam," not in line or ",2," not in line]
    long_ago = "2001-01-01T00:00:00+00:00"
    cut = [cut[0], *(f"{line.rpartition(',')[0]},{long_ago}\n" for line in cut[1:])]
    path.write_text("".join(cut), encoding="utf-8")
    result = cli(*arguments, "--seeds", 2, command="study")
    assert result.status == 0, result.err
    assert "1 runs complete, 3 to do" in result.out
    rows = read_rows(path)
    assert len(rows) == 8
    old = [(r["method"], r["seed"]) for r in rows if r["timestamp"] == long_ago]
    assert old == [("sgd", "0")] * 2

    def accuracy(table: list[dict[str, str]]) -> dict[tuple[str, str], str]:
        return {(r["method"], r["epoch"]): r["test_accuracy"] for r in table if r["seed"] == "0"}

    assert accuracy(rows) == accuracy(first)
    result = cli(*arguments[2:], "--epochs", 3, command="study")
    assert result.status == 2
    assert "holds runs with epochs 2, not 3" in result.err
    path.write_text(path.read_text(encoding="utf-8").replace(",ksam,", ",kasm,"), encoding="utf-8")
    result = cli(*arguments, command="study")
    assert result.status == 2
    assert "holds runs of kasm, which is no method" in result.err


def test_at_equal_cost_dearer_methods_train_for_fewer_epochs(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = (
        "--epochs", 5, "--equal-cost", "--train-samples", 96, "--batch-size", 32, "--seeds", 1,
        "--out", tmp_path,
    )  # fmt: skip
    result = cli(*arguments, "--methods", "sgd,sam,random-sam", command="study")
    assert result.status == 0, result.err
    epochs = Counter(row["method"] for row in read_rows(tmp_path / "study.csv"))
    assert epochs == {"sgd": 5, "sam": 2, "random-sam": 4}  # at a cost of 1, 2 and 1.25
    assert "SGD 5, SAM 2, random-subset SAM 4" in result.out
    assert "+" in result.out  # paired, though their last epochs differ
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    result = cli(*arguments, "--methods", "sgd,sam,random-sam,late-sam", command="study")
    assert "3 runs complete, 1 to do" in result.out
    rows = [row for row in read_rows(tmp_path / "study.csv") if row["method"] == "late-sam"]
    assert len(rows) == 4
    # "Late" counts from the end of its own four epochs of three steps: 2 of 12 steps are SAM's.
    assert float(rows[-1]["gradient_cost"]) == pytest.approx(14 / 12)


def test_the_study_stops_when_time_is_up(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "--epochs", 500, "--train-samples", 96, "--batch-size", 32, "--methods", "sgd",
        "--seeds", 1, "--minutes", 0.001, "--out", tmp_path, command="study",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert len(read_rows(tmp_path / "study.csv")) < 500


def test_processes_of_a_killed_study_end(tmp_path: Path) -> None:
    arguments = ("--epochs", "5000", "--methods", "sgd", "--seeds", "2", "--processes", "2")
    command = [sys.executable, "-m", "benchmarks", "study", *arguments, "--out", str(tmp_path)]
    study = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    table = tmp_path / "study.csv"

    def seen(text: str, path: Path) -> bool:
        return path.exists() and text in path.read_text(encoding="utf-8")

    def workers() -> list[Path]:
        parent = f"\nPPid:\t{study.pid}\n"
        return [path for path in Path("/proc").glob("[0-9]*/status") if seen(parent, path)]

    wait_for(lambda: seen(",1,", table) and len(workers()) >= 2)
    running = workers()
    study.kill()
    study.wait()
    wait_for(lambda: not any(path.exists() for path in running))


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_mistake_in_a_study_is_one_sentence(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("--train-samples", 5000, "--seeds", 1, "--methods", "sgd", "--out", tmp_path)
    result = cli(*arguments, command="study")
    assert result.status == 2
    assert "--train-samples 5000: the training set has 1347" in result.err
    assert "Traceback" not in result.err
