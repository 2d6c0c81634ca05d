"""Training runs: what a seed fixes, what a step does, how steps are timed and summarized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.__main__ import build_parser
from benchmarks.timing import Quartiles
from benchmarks.train.config import BASES, IMAGE_MODELS, TrainConfig, resolve
from benchmarks.train.images import ImageWorkload, load_digits
from benchmarks.train.loop import (
    EpochResult,
    data_generator,
    evaluate,
    seeded_model,
    train,
    warmup_cosine,
)
from benchmarks.train.methods import Method, make_method
from benchmarks.train.models import build_image_model
from benchmarks.train.plot import accuracy_curve
from benchmarks.train.report import format_table
from benchmarks.train.step_cost import measure_step_costs
from benchmarks.train.steps import Step, make_step, parameter_groups
from benchmarks.train.summary import Spread, summarize
from benchmarks.train.workload import LABEL, Batch
from ksam import KSAM

METHODS = ("sgd", "sam", "ksam")


class RecordingWorkload(ImageWorkload):
    """Digits, keeping a copy of every training batch and of every new model's weights."""

    def __init__(self, samples: int = 96) -> None:
        super().__init__(load_digits(), "cnn", torch.device("cpu"), samples)
        self.batches: list[Batch] = []
        self.weights: list[torch.Tensor] = []

    def build_model(self) -> nn.Module:
        model = super().build_model()
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return model

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        for batch in super().train_batches(batch_size, generator):
            self.batches.append(batch)
            yield batch


def make_config(*arguments: str) -> TrainConfig:
    defaults = ["train", "--epochs", "2", "--batch-size", "32"]
    return resolve(build_parser(["train"]).parse_args([*defaults, *arguments]))


def record(name: str, seed: int) -> RecordingWorkload:
    workload = RecordingWorkload()
    config = make_config()
    assert len(list(train(workload, make_method(name, config), config, seed, lambda: None))) == 2
    return workload


def test_a_seed_gives_all_methods_the_same_weights_and_batches() -> None:
    runs = [record(name, seed=1) for name in METHODS]
    for run in runs[1:]:
        assert torch.equal(run.weights[0], runs[0].weights[0])
        assert len(run.batches) == len(runs[0].batches) == 6
        for batch, expected in zip(run.batches, runs[0].batches, strict=True):
            assert torch.equal(batch["image"], expected["image"])
            assert torch.equal(batch[LABEL], expected[LABEL])


def test_another_seed_gives_other_weights_and_batches() -> None:
    one, two = record("sgd", seed=0), record("sgd", seed=1)
    assert not torch.equal(one.weights[0], two.weights[0])
    assert not torch.equal(one.batches[0][LABEL], two.batches[0][LABEL])
    # Epochs of one run differ as well.
    assert not torch.equal(one.batches[0][LABEL], one.batches[3][LABEL])


def test_a_seed_gives_the_same_dropout_whatever_loading_drew() -> None:
    workload = RecordingWorkload()
    seeded_model(workload, 3)
    expected = torch.rand(4)
    build = workload.build_model

    def build_and_draw() -> nn.Module:
        torch.rand(100)
        return build()

    workload.build_model = build_and_draw  # type: ignore[method-assign]
    seeded_model(workload, 3)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("name", "k"), [("sam", 1.0), ("ksam", 1 / 3)])
def test_sam_and_ksam_go_through_ksam(name: str, k: float) -> None:
    config = make_config("--rho", "0.1")
    workload = RecordingWorkload()
    model = seeded_model(workload, 0)
    optimizer, _ = make_step(make_method(name, config), workload, model, config)
    assert isinstance(optimizer, KSAM)
    assert optimizer.k == k
    assert optimizer.model is model
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("name", METHODS)
def test_label_smoothing_reaches_the_loss(name: str) -> None:
    losses = []
    for smoothing in ("0", "0.3"):
        config = make_config("--label-smoothing", smoothing)
        workload = RecordingWorkload()
        model = seeded_model(workload, 0)
        _, step = make_step(make_method(name, config), workload, model, config)
        batch = next(workload.train_batches(32, data_generator(0)))
        losses.append(step(batch))
        expected = F.cross_entropy(
            seeded_model(workload, 0)(batch["image"]),
            batch[LABEL],
            label_smoothing=float(smoothing),
        )
        torch.testing.assert_close(losses[-1], expected.detach())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_rate_and_weight_decay_reach_the_optimizer(name: str, base: str) -> None:
    config = make_config("--base", base, "--lr", "0.25", "--weight-decay", "0.125")
    workload = RecordingWorkload()
    optimizer, _ = make_step(make_method(name, config), workload, workload.build_model(), config)
    inner = optimizer.base if isinstance(optimizer, KSAM) else optimizer
    assert type(inner) is BASES[base]
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.0]


def test_only_matrices_and_kernels_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    decayed, rest = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert [p.ndim for p in decayed["params"]] == [2, 2]
    assert [p.ndim for p in rest["params"]] == [1, 1, 1, 1]


def test_schedule_warms_up_and_ends_near_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01


class _Constant(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return F.one_hot(torch.full((len(image),), 3), 10).float()


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_keeps_the_mode(training: bool) -> None:
    workload = RecordingWorkload()
    model = _Constant().train(training)
    labels = torch.cat([batch[LABEL] for batch in workload.test_batches()])
    assert evaluate(workload, model) == pytest.approx((labels == 3).float().mean().item())
    assert model.training is training


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_image_models_map_images_to_classes(name: str, channels: int, side: int) -> None:
    model = build_image_model(name, channels, 10, side)
    has_batchnorm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert has_batchnorm == (name != "vit")
    assert model(torch.randn(2, channels, side, side)).shape == (2, 10)


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet20", 20), ("resnet18", 18)])
def test_resnets_have_the_layers_they_are_named_after(name: str, layers: int) -> None:
    modules = build_image_model(name, 3, 10).modules()
    # 1x1 shortcuts do not count, by convention.
    weighted = [
        m
        for m in modules
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    ]
    assert len(weighted) == layers


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_step_costs_are_ratios_to_the_first_method(rounds: int) -> None:
    config = make_config("--timing-rounds", str(rounds))
    methods = [make_method(name, config) for name in METHODS]
    costs = measure_step_costs(RecordingWorkload(), methods, config)
    assert list(costs) == (list(METHODS) if rounds else [])
    for cost in costs.values():
        assert cost.rounds == rounds
        assert 0 < cost.ratio.q25 <= cost.ratio.median <= cost.ratio.q75
        assert cost.milliseconds > 0
    if rounds:
        assert costs["sgd"].ratio == Quartiles(1.0, 1.0, 1.0)


def test_steps_are_timed_in_rotated_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def new_step(method: Method, *_: Any) -> Callable[[Any], None]:
        return lambda batch: taken.append(method.name)

    monkeypatch.setattr("benchmarks.train.step_cost._new_step", new_step)
    config = make_config("--timing-rounds", "3")
    methods = [make_method(name, config) for name in ("sgd", "sam", "msam")]
    measure_step_costs(RecordingWorkload(), methods, config)
    warm_up, timed = taken[:-9], taken[-9:]
    assert len(warm_up) == 9
    assert timed == [
        *("sgd", "sam", "msam"), *("sam", "msam", "sgd"), *("msam", "sgd", "sam"),
    ]  # fmt: skip


def test_steps_that_differ_are_not_timed() -> None:
    """By a schedule, a policy, or by what they cost: the first ones are not the others."""
    config = make_config("--timing-rounds", "1")
    names = ("sgd", "late-sam", "nth-sam", "ausam", "stale-ksam", "ksam-auto", "msam")
    methods = [make_method(name, config) for name in names]
    costs = measure_step_costs(RecordingWorkload(), methods, config)
    assert list(costs) == ["sgd", "msam"]
    results = [EpochResult(name, 0, 2, 1.0, 0.5, 0.5) for name in names]
    table = format_table(config, summarize(methods, results, costs, 32), 32)
    assert "step cost: not measured where some steps are dearer" in table


def test_what_is_drawn_after_an_epoch_is_not_training_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.train.loop.time.perf_counter", lambda: now[0])

    def draw(step: Step) -> None:
        now[0] += 100.0

    monkeypatch.setattr("benchmarks.train.steps._SharpStep.end_epoch", draw)
    config = make_config()
    results = train(RecordingWorkload(), make_method("ksam", config), config, 0, lambda: None)
    assert [result.train_seconds for result in results] == [0.0, 0.0]
    assert now == [200.0]


def test_summary_takes_the_last_epoch_and_the_sample_sd() -> None:
    config = make_config("--methods", "ksam", "--seeds", "2")
    method = make_method("ksam", config)
    results = [
        EpochResult("ksam", seed, epoch, 10.0 * epoch + seed, 0.5, accuracy)
        for seed, accuracies in enumerate([(0.9, 0.5), (0.8, 0.7)])
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    (summary,) = summarize([method], results, {}, batch_size=30)
    assert summary.accuracy.mean == pytest.approx(0.6)
    assert summary.accuracy.sd == pytest.approx(math.sqrt(0.02))
    assert summary.seconds.mean == pytest.approx(20.5)
    assert summary.theory == 1.0
    assert summary.non_finite_runs == 0
    assert summary.runs == 2
    table = format_table(config, [summary], batch_size=30)
    assert "60.00 ± 14.14" in table
    assert "20.50 ± 0.71" in table


def test_gains_are_paired_by_seed() -> None:
    """Seeds differ by 0.2, the methods by 0.01 and 0.03: a standard error of 0.01."""
    config = make_config("--methods", "sgd,sam", "--seeds", "3")
    accuracies = {"sgd": [0.5, 0.7, 0.9], "sam": [0.51, 0.73]}  # the third is still to come
    results = [
        EpochResult(name, seed, 2, 1.0, 0.5, accuracy)
        for name, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    methods = [make_method(name, config) for name in accuracies]
    base, sam = summarize(methods, results, {}, batch_size=32)
    assert base.gain is None
    assert sam.gain is not None
    assert (sam.gain.mean, sam.gain.sd) == pytest.approx((0.02, 0.01))
    assert "+2.00 ± 1.00" in format_table(config, [base, sam], batch_size=32)


def test_curves_are_means_over_seeds_at_the_time_or_the_cost() -> None:
    method = make_method("sam", make_config())
    results = [
        EpochResult("sam", seed, epoch, 10.0 * epoch + seed, 0.5, 0.1 * epoch + 0.02 * seed, 2.0)
        for seed in range(2)
        for epoch in (1, 2)
    ]
    for over_cost, expected in ((False, [10.5, 20.5]), (True, [2.0, 4.0])):
        spent, mean, sd = accuracy_curve(method, results, over_cost)
        assert sd is not None
        assert spent.tolist() == expected
        assert mean.tolist() == pytest.approx([0.11, 0.21])
        assert sd.tolist() == pytest.approx([0.02 / math.sqrt(2)] * 2)


def test_one_seed_has_no_sd() -> None:
    assert Spread.of([0.5]) == Spread(0.5, None)
    config = make_config("--methods", "sgd", "--seeds", "1")
    result = EpochResult("sgd", 0, 1, 1.0, 0.5, 0.25)
    summaries = summarize([make_method("sgd", config)], [result], {}, batch_size=32)
    assert "±" not in format_table(config, summaries, batch_size=32)


def test_divergence_is_reported_not_raised(tmp_path: Path) -> None:
    config = make_config("--methods", "sgd", "--seeds", "1", "--lr", "1e30")
    config = dataclasses.replace(config, out=tmp_path)
    method = make_method("sgd", config)
    results = list(train(RecordingWorkload(), method, config, 0, lambda: None))
    assert not results[-1].finite
    table = format_table(config, summarize([method], results, {}, 32), 32)
    assert f"{100 * results[-1].test_accuracy:.2f}*" in table
    assert "* SGD: the training loss was not finite in 1 of 1 runs" in table
