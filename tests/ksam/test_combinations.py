"""Samplers combined: every ascent with every descent that may follow it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ksam import SharpnessAware
from ksam.parts import Sampler
from ksam.samplers import All, Importance, LossIncrease, Ordered, Random, TopK
from ksam.tables import SharpnessSample, StaleTopK
from tests.helpers import all_same_bits
from tests.ksam import plain
from tests.ksam.models import SIZE, Batch, batch, data_of, loss_of, losses, network, weights

M = 24
RADIUS = 50.0  # so large that other samples have the highest losses after the perturbation

ASCENTS: dict[str, Callable[[], Sampler]] = {
    "All": All,
    "TopK": lambda: TopK(6),
    "half random": lambda: TopK(8, random=0.5),
    "all random": lambda: TopK(6, random=1.0),
    "Importance": lambda: Importance(6),
    "Ordered": lambda: Ordered(12),
    "Random": lambda: Random(6),
    "StaleTopK": lambda: StaleTopK(6, SIZE, "index", refresh=3),
}
DESCENTS: dict[str, Callable[[], Sampler | None]] = {
    **ASCENTS,
    "LossIncrease": lambda: LossIncrease(12),
    "the same": lambda: None,
}
PAIRS = [
    *(
        (ascent, descent)
        for ascent in ASCENTS
        for descent in DESCENTS
        if descent != "LossIncrease" or ascent not in ("Random", "StaleTopK")  # refused
    ),
    ("SharpnessSample", "the same"),
]


def combined(model: nn.Module, ascent: Sampler, descent: Sampler | None) -> SharpnessAware:
    return SharpnessAware(
        model.parameters(),
        torch.optim.SGD,
        lr=0.1,
        rho=0.5,
        ascent=ascent,
        descent=descent,
        model=model,
    )


@pytest.mark.parametrize(("ascent", "descent"), PAIRS)
def test_cost_selection_and_statistics_are_what_the_step_does(
    backend: str, ascent: str, descent: str
) -> None:
    first = {**ASCENTS, "SharpnessSample": lambda: SharpnessSample(12, SIZE, "index")}[ascent]
    model = network(batchnorm=True, dtype=torch.float64)
    optimizer = combined(model, first(), DESCENTS[descent]())
    spent: list[int] = []

    def function(b: Batch) -> Tensor:
        """Counts a forward pass over a sample as 1 and a backward pass as 2."""
        spent.append(len(b["x"]) * (3 if torch.is_grad_enabled() else 1))
        return losses(model)(b)

    for step in range(4):
        cost, selected = optimizer.cost(M), optimizer.num_selected(M, step)
        spent.clear()
        result = optimizer.step(function, data_of(step))
        assert cost == pytest.approx(sum(spent) / (3 * M))
        assert len(result.indices) == selected
        assert int(model[1].num_batches_tracked) == step + 1


def test_the_share_is_not_that_of_the_descent_s_highest_losses(backend: str) -> None:
    """As many samples as were drawn, but by the losses after the perturbation."""
    model = network(dtype=torch.float64)
    optimizer = combined(model, Importance(6), TopK(6))
    optimizer.param_groups[0]["rho"] = RADIUS
    optimizer.report_share = True
    result = optimizer.step(losses(model), data_of(0))
    highest = plain.largest(result.losses, 6)
    share = float(result.losses[highest].sum() / result.losses.sum())
    assert float(result.share) == pytest.approx(share)


def test_the_selection_is_not_the_descent_s_where_the_ascent_s_pass_makes_it(
    backend: str,
) -> None:
    model = network(dtype=torch.float64)
    result = combined(model, Ordered(12), TopK(6)).step(losses(model), data_of(0))
    assert torch.equal(result.indices, plain.largest(result.losses, 12))


def test_the_samples_of_an_ascent_s_own_pass_descend(backend: str) -> None:
    """Those that had the highest losses before the perturbation."""
    model, other = network(dtype=torch.float64), network(dtype=torch.float64)
    data = batch(dtype=torch.float64)
    optimizer = combined(model, Ordered(12), None)
    optimizer.param_groups[0]["rho"] = RADIUS
    result = optimizer.step(losses(model), data)
    chosen = plain.rows(data, result.indices)
    plain.sam(other, chosen, chosen, RADIUS)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_without_a_pass_over_the_batch_before_the_ascent_matching_is_as_with_the_subset(
    backend: str,
) -> None:
    """The descent makes that pass: its statistics are there too late for the ascent."""
    found = []
    for statistics in ("subset", "matched"):
        model = network(batchnorm=True)
        optimizer = SharpnessAware(
            model.parameters(), torch.optim.SGD, lr=0.1, ascent=Random(8), descent=TopK(8),
            model=model, statistics=statistics,
        )  # fmt: skip
        optimizer.step(loss_of(model), batch())
        found.append(weights(model))
    assert all_same_bits(*found)
