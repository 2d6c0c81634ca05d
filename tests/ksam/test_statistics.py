"""What BatchNorm normalizes the passes over a subset with, and what it remembers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ksam import KSAM
from tests.ksam.models import batch, loss_of, network


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", ["subset", "full", "running"])
@pytest.mark.parametrize("k", [8, 1.0])
def test_running_statistics_are_those_of_one_plain_pass(
    backend: str, statistics: str, momentum: float | None, k: float
) -> None:
    model = network(batchnorm=True)
    model[1].momentum = momentum
    twin = copy.deepcopy(model)
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, k=k, model=model, statistics=statistics
    )
    for step in range(3):
        twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
        twin(batch(step)["x"])
        optimizer.step(loss_of(model), batch(step))
        for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-7)
    assert model[1].momentum == momentum
    assert model[1].training


@pytest.mark.parametrize("statistics", ["subset", "full", "running"])
def test_subset_passes_normalize_with_the_statistics_asked_for(
    backend: str, statistics: str
) -> None:
    model = network(batchnorm=True, dtype=torch.float64)
    norm, data = model[1], batch(dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    norm.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, k=8, model=model,
        statistics=statistics,
    )  # fmt: skip
    before = norm.running_mean.clone(), norm.running_var.clone()
    optimizer.step(loss_of(model), data)
    whole, subset = seen[0][0], seen[1][0]
    mean, var = {
        "subset": (subset.mean(0), subset.var(0, correction=0)),
        "full": (whole.mean(0), whole.var(0)),
        "running": (0.9 * before[0] + 0.1 * whole.mean(0), 0.9 * before[1] + 0.1 * whole.var(0)),
    }[statistics]
    expected = (subset - mean) / (var + norm.eps).sqrt()
    for inputs, out in seen[1:]:
        assert inputs.shape[0] == 8
        torch.testing.assert_close(out, expected)


def test_layers_that_track_nothing_are_left_alone(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 5)
    )
    for statistics in ("full", "running"):
        optimizer = KSAM(
            model.parameters(), torch.optim.SGD, lr=0.1, model=model, statistics=statistics
        )
        assert optimizer.step(loss_of(model), batch()).loss.isfinite()
