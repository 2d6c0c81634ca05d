"""How many samples the methods take, and which."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ksam import KSAM, ImportanceKSAM, OrderedSGD, SharpnessAware
from ksam.samplers import AccuracySchedule, All, Ordered, Random, TopK
from tests.helpers import all_same_bits
from tests.ksam import plain
from tests.ksam.models import NAMES, batch, build, data_of, loss_of, losses, network, weights


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_selected_samples_is_told(name: str) -> None:
    sizes = {
        "KSAM": 8, "ESAM": 10, "RandomSubsetSAM": 6, "OrderedSGD": 9, "StaleKSAM": 8,
        "ImportanceKSAM": 8,
    }  # fmt: skip
    optimizer = build(name, network())
    assert optimizer.num_selected(24) == sizes.get(name, 24)
    assert optimizer.num_selected(24, 3) == {**sizes, "AUSAM": 9}.get(name, 24)


@pytest.mark.parametrize("name", ["KSAM", "ImportanceKSAM", "StaleKSAM"])
def test_no_pass_selects_where_all_are_selected(name: str) -> None:
    assert build(name, network(), k=1.0).cost(24) == 2


AMOUNTS = {
    "KSAM": "k",
    "ImportanceKSAM": "k",
    "StaleKSAM": "k",
    "ESAM": "gamma",
    "RandomSubsetSAM": "share",
    "OrderedSGD": "q",
    "AUSAM": "alpha",
}


@pytest.mark.parametrize(("name", "argument"), AMOUNTS.items())
def test_the_number_of_samples_may_be_set_anew(name: str, argument: str) -> None:
    optimizer = build(name, network(), **{argument: 8})
    optimizer.steps_done = 3  # AUSAM takes all in the first epoch
    assert getattr(optimizer, argument) == 8
    setattr(optimizer, argument, 5)
    assert getattr(optimizer, argument) == 5
    assert optimizer.num_selected(24) == 5
    with pytest.raises(ValueError, match=rf"{argument} .*0"):
        setattr(optimizer, argument, 0)
    assert getattr(optimizer, argument) == 5


def test_a_step_selects_as_many_as_were_last_asked_for(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8)
    optimizer.k = 5
    assert len(optimizer.step(loss_of(model), batch()).indices) == 5


def test_a_count_may_be_one_of_numpy(backend: str) -> None:
    numpy = pytest.importorskip("numpy")
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=numpy.int64(5))
    assert len(optimizer.step(loss_of(model), batch()).indices) == 5


@pytest.mark.parametrize("name", ["KSAM", "StaleKSAM"])
def test_a_schedule_of_k_keeps_its_state_in_a_resume(name: str) -> None:
    schedule = AccuracySchedule()
    optimizer = build(name, network(), k=schedule)
    schedule.accuracy = 0.9
    resumed = build(name, network(), k=AccuracySchedule())
    assert resumed.num_selected(64) == 64
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.num_selected(64) == 16


def test_copies_of_ordered_sgd_hear_of_their_own_accuracy() -> None:
    optimizer = OrderedSGD(network().parameters(), torch.optim.SGD, lr=0.1)
    clone = copy.deepcopy(optimizer)
    schedule: Any = clone.q
    schedule.accuracy = 0.9
    assert (clone.num_selected(64), optimizer.num_selected(64)) == (16, 64)


def test_both_gradients_may_be_of_one_random_subset(backend: str) -> None:
    model = network()
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1, ascent=Random(0.25))
    result = optimizer.step(loss_of(model), batch())
    assert len(result.losses) == len(result.indices) == 6


@pytest.mark.parametrize("name", NAMES)
def test_selected_samples_are_in_order(backend: str, name: str) -> None:
    """Also those that are drawn: with replacement, or beside the highest losses."""
    model = network(dtype=torch.float64)
    optimizer = build(name, model)
    for step in range(5):
        indices = optimizer.step(losses(model), data_of(step)).indices.tolist()
        assert indices == sorted(indices)


def test_no_weight_exceeds_one_over_uniform(backend: str) -> None:
    """One sample has all of the loss; the gradient of its own parameter tells a sample's weight."""
    p = nn.Parameter(torch.zeros(24))
    optimizer = ImportanceKSAM([p], torch.optim.SGD, lr=0.0, k=12, uniform=0.5)
    data = {"i": torch.arange(24), "loss": torch.eye(24)[0]}

    def function(b: dict[str, Tensor]) -> Tensor:
        own = p[b["i"]]
        return b["loss"] + own - own.detach()

    allowed = torch.full((24,), 2.0)
    allowed[0] = 1 / (24 * (0.5 + 0.5 / 24))
    for _ in range(3):
        indices = optimizer.step(function, data).indices
        times = torch.bincount(indices, minlength=24)
        assert times[1:].any()
        torch.testing.assert_close(p.grad, allowed * times / 12)


def test_importance_without_any_gradient_moves_nothing(backend: str) -> None:
    """All samples are then drawn alike, each within four standard deviations as often."""
    model = network()
    before = weights(model)
    optimizer = ImportanceKSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8)
    counts = torch.zeros(24)
    for _ in range(30):
        result = optimizer.step(lambda b: 0.0 * model(b["x"]).square().sum(1), batch())
        counts += torch.bincount(result.indices, minlength=24)
    assert all_same_bits(weights(model), before)
    p, n = 1 / 24, 30 * 8
    assert float((counts - n * p).abs().max()) < 4 * math.sqrt(n * p * (1 - p))


def test_seeds_draw_other_samples_in_every_step(backend: str) -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        model = network(dtype=torch.float64)
        optimizer = build("RandomSubsetSAM", model, seed=seed)
        found = [optimizer.step(losses(model), data_of(0)).indices for _ in range(4)]
        return [tuple(indices.tolist()) for indices in found]

    assert len({*drawn(0), *drawn(1)}) == 8


def share_of(found: Tensor, indices: Tensor) -> float:
    return float(found[indices].sum() / found.sum())


@pytest.mark.parametrize("name", ["KSAM", "ESAM", "OrderedSGD"])
def test_a_reported_share_is_that_of_the_samples_that_were_taken(backend: str, name: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = build(name, model)
    optimizer.report_share = True
    for step in range(3):
        result = optimizer.step(losses(model), data_of(step))
        assert float(result.share) == pytest.approx(share_of(result.losses, result.indices))


def test_so_it_is_where_another_pass_sees_the_batch(backend: str) -> None:
    """The random samples climb, and the descent's pass over the batch tells the losses."""
    model = network(dtype=torch.float64)
    optimizer = build("RandomSubsetSAM", model)
    optimizer.report_share = True
    result = optimizer.step(losses(model), data_of(0))
    assert float(result.share) == pytest.approx(share_of(result.losses, result.indices))


@pytest.mark.parametrize("sharp", [True, False])
def test_the_share_of_weighted_samples_is_that_of_the_highest_losses(
    backend: str, sharp: bool
) -> None:
    model = network(dtype=torch.float64)
    optimizer = build("ImportanceKSAM", model, when=lambda step: sharp)
    optimizer.report_share = True
    result = optimizer.step(losses(model), data_of(0))
    highest = plain.largest(result.losses, 8)
    assert float(result.share) == pytest.approx(share_of(result.losses, highest))


def test_the_scale_by_share_is_that_of_the_samples_whose_loss_rose_most(backend: str) -> None:
    grads = []
    for scale in ("mean", "share"):
        model = network(dtype=torch.float64)
        optimizer = build("ESAM", model, scale=scale)
        result = optimizer.step(losses(model), data_of(0))
        grads.append([p.grad for p in model.parameters()])
    factor = 10 / 24 / share_of(result.losses, result.indices)
    for mean, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled, mean * factor, rtol=1e-6, atol=1e-12)


def test_the_scale_by_share_is_that_of_the_descent_where_the_ascent_has_samples_too(
    backend: str,
) -> None:
    grads = []
    for scale in ("mean", "share"):
        model = network(dtype=torch.float64)
        optimizer = SharpnessAware(
            model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, ascent=TopK(4), descent=TopK(12),
            scale=scale,
        )  # fmt: skip
        result = optimizer.step(losses(model), data_of(0))
        grads.append([p.grad for p in model.parameters()])
    highest = plain.largest(result.losses, 12)
    factor = 12 / 24 / share_of(result.losses, highest)
    for mean, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled, mean * factor, rtol=1e-6, atol=1e-12)
    assert torch.equal(result.indices, plain.largest(result.losses, 4))
    assert float(result.share) == pytest.approx(share_of(result.losses, result.indices))


def test_the_highest_losses_of_an_ascent_s_own_pass_are_its_selection(backend: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = SharpnessAware(
        model.parameters(), torch.optim.SGD, lr=0.1, ascent=Ordered(9), descent=All()
    )
    result = optimizer.step(losses(model), data_of(0))
    assert torch.equal(result.indices, plain.largest(result.losses, 9))
