"""A perturbation along the momentum: which bases have one, and how far it goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ksam import (
    MSAM,
    AutoKSAM,
)
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, noting_weights, weights


class KeywordsOnly(torch.optim.Adam):
    """Of Adam's kin by its base class."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


class OfAnotherLibrary(torch.optim.Optimizer):
    """Of Adam's kin by its arguments."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})


class Quantized(torch.Tensor):
    """Numbers that are no memory to read, as torchao's states of eight bits."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)

    def dequantize(self) -> torch.Tensor:
        return self.numbers.clone()


class OwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


class QuantizedSGD(OwnStep):
    """Its momentum is quantized between its steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].numbers
        super().step(closure)
        for state in self.state.values():
            state["momentum_buffer"] = Quantized(state["momentum_buffer"])


@pytest.mark.parametrize("name", ["Adagrad", "ASGD", "Rprop", "RMSprop", "SGD"])
@pytest.mark.parametrize("method", [MSAM, AutoKSAM])
def test_a_base_without_momentum_is_refused(method: type[Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"base must have momentum or betas.*got {name} with"):
        method(network().parameters(), getattr(torch.optim, name), lr=0.1)


class Unknown(torch.optim.Adam):
    """Has betas, and keeps what it makes of them under names of its own."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for state in self.state.values():
            state["z"] = state.pop("exp_avg")


def test_a_momentum_that_is_not_found_is_no_silent_plain_step(backend: str) -> None:
    model = network()
    optimizer = MSAM(model.parameters(), Unknown, lr=0.01)
    optimizer.step(loss_of(model), batch())
    before = weights(model)
    with pytest.raises(ValueError, match=r"its momentum .* got Unknown with exp_avg_sq, step, z"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)


@pytest.mark.parametrize(
    ("make", "found"),
    [(lambda v: {0.9: v}, "a dict"), (lambda v: v.flatten()[:1], r"\(1,\)")],
    ids=["of several", "of low rank"],
)
def test_a_momentum_of_another_shape_is_no_silent_plain_step(
    backend: str, make: Callable[[torch.Tensor], Any], found: str
) -> None:
    model = network()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9)
    optimizer.step(loss_of(model), batch())
    before = weights(model)
    state = optimizer.state[model[0].weight]
    state["momentum_buffer"] = make(state["momentum_buffer"])
    with pytest.raises(ValueError, match=rf"momentum of each parameter's shape .*SGD with {found}"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)


@pytest.mark.parametrize(
    ("method", "name"), [(MSAM, "rho"), (AutoKSAM, "momentum_rho")], ids=["MSAM", "AutoKSAM"]
)
def test_the_radius_along_the_momentum(method: type[Any], name: str) -> None:
    """By the base where it is not given; a bad one is named as the user knows it."""

    def radius(base: Any, **arguments: Any) -> Any:
        optimizer = method(network().parameters(), base, lr=0.1, **arguments)
        part = optimizer.ascent if method is MSAM else optimizer.otherwise
        return -part.radius(optimizer.param_groups[0], 0)

    for kin in ("Adam", "Adamax", "AdamW", "NAdam", "RAdam"):
        assert radius(getattr(torch.optim, kin)) == 0.05
    assert radius(KeywordsOnly) == 0.05
    assert radius(OfAnotherLibrary) == 0.05
    assert radius(torch.optim.SGD, momentum=0.9) == 0.3
    assert radius(torch.optim.AdamW, **{name: 0.7}) == 0.7
    for bad, error in (("Auto", TypeError), (-1, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match=rf"^{name} must be .*{bad}"):
            radius(torch.optim.SGD, momentum=0.9, **{name: bad})


class Around(torch.optim.Optimizer):
    """Keeps all state in an optimizer within, as timm's Lookahead does."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"momentum": 0.9})
        self.within = torch.optim.SGD(self.param_groups, lr=0.1, **options)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.within.step()


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("method", [MSAM, AutoKSAM])
def test_a_momentum_that_is_nowhere_to_be_found_is_told_of_once(
    backend: str, method: type[Any], two_calls: bool
) -> None:
    def train(base: Any, model: nn.Module, clears: bool = False) -> tuple[list[str], float]:
        optimizer = method(model.parameters(), base, momentum=0.9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(5):
                if two_calls:
                    optimizer.zero_grad()
                    optimizer.backward(loss_of(model), batch(step), weight=0.5)
                    result = optimizer.backward(loss_of(model), batch(step), weight=0.5)
                    optimizer.step()
                else:
                    result = optimizer.step(loss_of(model), batch(step))
                if clears:
                    optimizer.state.clear()
        return [str(warning.message) for warning in caught], float(result.grad_norm)

    (message,), norm = train(Around, network())
    assert "weights are not perturbed" in message
    assert "the base, Around," in message
    assert norm == 0
    # Not of state that is still to come, or that somebody clears.
    for base in (torch.optim.SGD, torch.optim.RMSprop):
        for clears in (False, True):
            assert train(base, network(), clears)[0] == []


def test_a_momentum_that_is_still_to_come_is_none(backend: str) -> None:
    """As older checkpoints of torch's SGD have it."""
    model, twin = network(), network()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.base.state[p] = {"momentum_buffer": None}
    optimizer.step(loss_of(model), batch())
    MSAM(twin.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9).step(loss_of(twin), batch())
    assert all_same_bits(weights(model), weights(twin))


def test_a_group_without_momentum_is_refused() -> None:
    optimizer = MSAM(network().parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum .*SGD with momentum=0\.0"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(())), "momentum": 0.0})
    assert len(optimizer.param_groups) == 1


def test_frozen_weights_are_not_perturbed(backend: str) -> None:
    """Frozen in mid-run, they have a momentum but no direction."""
    model = network()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(loss_of(model), batch())
    model[0].weight.requires_grad_(False)
    before = weights(model)
    function, seen = noting_weights(model)
    optimizer.step(function, batch())
    assert all_same_bits(before[:1], seen[0][:1])
    assert not all_same_bits(before[1:], seen[0][1:])


def test_a_quantized_momentum_is_what_it_stands_for(backend: str) -> None:
    ends = []
    for base in (OwnStep, QuantizedSGD):
        model = network()
        optimizer = MSAM(model.parameters(), base, lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.step(loss_of(model), batch(step))
        ends.append(weights(model))
    assert all_same_bits(*ends)
