"""Every method on the command line, and label noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import build_parser
from benchmarks.train.config import TrainConfig, resolve
from benchmarks.train.images import ImageWorkload, load_digits
from benchmarks.train.loop import seeded_model, train
from benchmarks.train.methods import METHODS, make_method
from benchmarks.train.steps import make_step
from benchmarks.train.workload import INDEX, LABEL, with_noise
from ksam import From, OrderedSGD, Representative, SharpnessAware
from tests.helpers import read_rows

CPU = torch.device("cpu")


def config(*arguments: str) -> TrainConfig:
    defaults = ["train", "--epochs", "2", "--batch-size", "32", "--train-samples", "128"]
    return resolve(build_parser(["train"]).parse_args([*defaults, *arguments]))


@pytest.fixture(scope="module")
def workload() -> ImageWorkload:
    return ImageWorkload(load_digits(), "cnn", CPU, 128)


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
        ("ordered", 1.0), ("msam", 1.0), ("ausam", 1.5), ("ksam", 1.0), ("ksam-auto", 1.0),
        ("ksam-auto-plain", 1.0), ("late-sam", 1.2), ("late-ksam", 1.0), ("nth-sam", 1.2),
        ("stale-ksam", 1 + 1 / 30),
    ],
)  # fmt: skip
def test_theoretical_costs(name: str, cost: float) -> None:
    """Over two epochs, the first of which is SAM's with AUSAM."""
    assert make_method(name, config()).theoretical_cost(96) == pytest.approx(cost, abs=0.02)


def test_labels_name_what_the_command_line_chose() -> None:
    settings = config("--base", "adamw", "--k", "1/2", "--late", "0.3")
    labels = {name: make_method(name, settings).label for name in METHODS}
    assert labels["sgd"] == "AdamW"
    assert labels["ksam-auto-plain"] == "auto K-SAM, k=1/2, else AdamW"
    assert labels["late-ksam"] == "K-SAM, k=1/2, last 30%"
    assert len(set(labels.values())) == len(METHODS)


@pytest.mark.parametrize(("epochs", "own"), [(3, 2), (30, 29)])
def test_a_dear_first_epoch_counts_at_equal_cost(epochs: int, own: int) -> None:
    ausam = make_method("ausam", config("--epochs", str(epochs), "--equal-cost"))
    assert ausam.epochs == own
    assert own * ausam.theoretical_cost(32) == pytest.approx(epochs)


def test_costs_are_of_batches_that_there_are_samples_for() -> None:
    """k = 43 of 64, where a batch would have 128."""
    settings = config(
        "--epochs", "10", "--equal-cost", "--train-samples", "64", "--batch-size", "128",
        "--k", "43",
    )  # fmt: skip
    ksam = make_method("ksam", settings)
    assert ksam.theoretical_cost(settings.batch_size) == pytest.approx((64 + 6 * 43) / (3 * 64))
    assert ksam.epochs == 6


def test_options_reach_their_methods(workload: ImageWorkload) -> None:
    settings = config(
        "--asam-rho", "0.7", "--msam-rho", "0.4", "--late", "0.5", "--threshold", "0.5",
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
    assert build("late-sam").when == From(4)  # of 2 x 4 steps
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
