"""Passes under torch.autocast and activation checkpointing are those without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ksam
from ksam import KSAM, SAM
from ksam.arguments import STATISTICS
from tests.device import DEVICE
from tests.helpers import all_same_bits
from tests.ksam.models import Batch, batch, loss_of, network, weights
from tests.ksam.test_family import NAMES, build, data_of, losses
from tests.ksam.test_reliability import fails_in_call


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_the_step_is_autocast_in_the_function(backend: str, name: str) -> None:
    """Autocast keeps its copies of the weights until its outermost block ends."""

    def run(outside: bool) -> list[Tensor]:
        model = network()
        optimizer = build(name, model, **({} if name == "OrderedSGD" else {"rho": 0.5}))

        def inside(b: Batch) -> Tensor:
            with autocast():
                return losses(model)(b)

        grads = []
        for step in range(3):
            data = {**data_of(step), "x": data_of(step)["x"].float()}
            if outside:
                with autocast():
                    optimizer.step(losses(model), data)
            else:
                optimizer.step(inside, data)
            grads += [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        return grads

    assert all_same_bits(run(outside=True), run(outside=False))


@pytest.mark.parametrize("failing", [None, 3])
def test_no_perturbed_weights_are_left_in_autocast(backend: str, failing: int | None) -> None:
    """Whether the step ends or breaks off in the descent; its learning rate is 0."""
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=5.0)
    with autocast():
        expected = loss_of(model)(batch())
    with autocast():
        if failing is None:
            optimizer.step(loss_of(model), batch())
        else:
            with pytest.raises(RuntimeError, match="boom"):
                optimizer.step(fails_in_call(model, failing, RuntimeError("boom")), batch())
        assert torch.equal(loss_of(model)(batch()), expected)


def test_diagnostics_in_autocast_see_the_weights_as_they_are(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.5)

    def inside(b: Batch) -> Tensor:
        with autocast():
            return loss_of(model)(b)

    before = inside(batch())

    def measure(function: Callable[[Any], Tensor]) -> tuple[float, ...]:
        cosine = float(ksam.alignment(optimizer, function, batch(), 8))
        return cosine, *ksam.sharpness(model, function, [batch()], rho=0.5)

    expected = measure(inside)
    with autocast():
        with torch.no_grad():
            loss_of(model)(batch())  # copies without a gradient
        assert measure(loss_of(model)) == expected
        with torch.no_grad():
            assert torch.equal(loss_of(model)(batch()), before)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.body = network(batchnorm=True, dtype=torch.float64)
        self.head = nn.Linear(5, 5).double()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x))
        x = x.clone().requires_grad_()  # without it reentrant checkpointing has no gradient
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("method", [KSAM, SAM])
def test_activation_checkpointing_changes_nothing(
    backend: str, method: type[Any], statistics: str, momentum: float | None, reentrant: bool
) -> None:
    """The forward in the backward pass sees BatchNorm as the first one did."""
    found = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed(how)
        model.body[1].momentum = momentum
        optimizer = method(
            model.parameters(), torch.optim.SGD, lr=0.1, model=model, statistics=statistics
        )
        for step in range(2):
            optimizer.step(loss_of(model), batch(step, dtype=torch.float64))
        grads = [p.grad for p in model.parameters()]
        found.append([*weights(model), *grads, *model.buffers()])
        assert model.body[1].momentum == momentum
    assert all_same_bits(*found)
