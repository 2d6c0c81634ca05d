"""Geometries: what they return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ksam import ASAM, ESAM, SAM
from ksam.geometry import Geometry, Moving, StochasticWeights
from tests.helpers import all_same_bits, default_dtype
from tests.ksam.models import batch, loss_of, losses, network, weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", [StochasticWeights(1e-9), Geometry()], ids=["none", "all"])
def test_the_norm_is_float32_whatever_the_default_dtype(
    backend: str, geometry: Geometry, dtype: torch.dtype
) -> None:
    """Also where no weight is drawn, and so none is moved."""
    params = [torch.ones(3)]
    moving = Moving(params, [torch.zeros(3)], [torch.empty(3)], [0.1], [])
    with default_dtype(dtype):
        norm = geometry.perturb(moving, {}, "0/0")
    assert norm.dtype == torch.float32
    assert norm.device == params[0].device
    assert float(norm) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_asam_returns_the_norm_of_all_that_moves(backend: str, bias: bool) -> None:
    """T is |w| + eta for weights and 1 for biases, of which there may be none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias), nn.Tanh(), nn.Linear(16, 5, bias)).double()
    data = batch(dtype=torch.float64)
    grads = torch.autograd.grad(losses(model)(data).mean(), list(model.parameters()))
    squares = [
        ((w.abs() + 0.02 if "weight" in name else torch.ones_like(w)) * g).square().sum()
        for (name, w), g in zip(model.named_parameters(), grads, strict=True)
    ]
    optimizer = ASAM(model.named_parameters(), torch.optim.SGD, lr=0.1, eta=0.02)
    norm = optimizer.step(losses(model), data).grad_norm
    torch.testing.assert_close(norm, torch.stack(squares).sum().sqrt().float(), rtol=1e-5, atol=0)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eta must be 0 unless adaptive=True, got 0\.5"):
        Geometry(eta=0.5)
    with pytest.raises(TypeError, match=r"adaptive must be a bool, got 0\.5"):
        Geometry(adaptive=0.5)  # type: ignore[arg-type]


def test_every_tensor_is_drawn_with_probability_one(backend: str) -> None:
    """ESAM is SAM then, but for the samples that it descends on: here all."""
    model, twin = network(), network()
    for step in range(2):
        ESAM(model.parameters(), torch.optim.SGD, lr=0.1, beta=1, gamma=1.0).step(
            loss_of(model), batch(step)
        )
        SAM(twin.parameters(), torch.optim.SGD, lr=0.1).step(loss_of(twin), batch(step))
    assert all_same_bits(weights(model), weights(twin))
