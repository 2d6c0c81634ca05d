"""A radius that follows the learning rate, wherever a radius can stand."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from ksam import KSAM, MSAM, ByLearningRate, EveryNth, Momentum, SharpnessAware
from ksam.samplers import All
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, weights

SGD: dict[str, Any] = {"lr": 0.4, "momentum": 0.9}


def warmup_and_decay(step: int) -> float:
    return (step + 1) / 2 if step < 2 else 1 / step


@pytest.mark.parametrize("method", [KSAM, MSAM])
def test_it_is_the_schedule_of_the_learning_rate(backend: str, method: type[Any]) -> None:
    """The weights are those of the same radii, up to their rounding, as a function of the step."""
    model, twin = network(), network()
    follows = method(model.parameters(), torch.optim.SGD, rho=ByLearningRate(0.2), **SGD)
    told = method(
        twin.parameters(), torch.optim.SGD, rho=lambda step: 0.2 * warmup_and_decay(step), **SGD
    )
    schedulers = [lr_scheduler.LambdaLR(each, warmup_and_decay) for each in (follows, told)]
    for step in range(5):
        follows.step(loss_of(model), batch())
        told.step(loss_of(twin), batch())
        [group] = follows.param_groups
        assert group["rho"] == pytest.approx(0.2 * warmup_and_decay(step), rel=1e-12)
        assert group["peak_lr"] == 0.4
        for scheduler in schedulers:
            scheduler.step()
    for one, other in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Begins at a 25th of max_lr.
        (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=9), 0.04),
        (lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.25), 0.25),
        (lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0), 1.0),
        (lambda optimizer: None, 1.0),
    ],
    ids=["max_lr", "initial_lr", "constant", "none"],
)
def test_the_peak_is_what_schedulers_note(
    backend: str, schedule: Callable[[Any], object], expected: float
) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, rho=ByLearningRate(1.0), **SGD)
    schedule(optimizer)
    optimizer.step(loss_of(model), batch())
    assert optimizer.param_groups[0]["rho"] == pytest.approx(expected, rel=1e-12)


def test_without_a_scheduler_it_is_the_highest_rate_so_far_also_after_a_resume(
    backend: str,
) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, rho=ByLearningRate(1.0), **SGD)

    def radii(optimizer: KSAM, rates: list[float]) -> list[float]:
        found = []
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step(loss_of(model), batch())
            found.append(optimizer.param_groups[0]["rho"])
        return found

    assert radii(optimizer, [0.0, 0.25, 0.5, 0.125]) == [0.0, 1.0, 1.0, 0.25]
    resumed = KSAM(model.parameters(), torch.optim.SGD, rho=ByLearningRate(1.0), **SGD)
    resumed.param_groups[0]["lr"] = 0.0
    resumed.load_state_dict(optimizer.state_dict())
    assert radii(resumed, [0.125]) == [0.25]


def test_every_group_follows_its_own_rate(backend: str) -> None:
    model = network()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.4, "rho": ByLearningRate(0.5)}, {"params": others}]
    optimizer = KSAM(groups, torch.optim.SGD, rho=0.1, **SGD)
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1]
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(2)), "lr": 0.1})
    lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.step(loss_of(model), batch())
    assert [group["rho"] for group in optimizer.param_groups] == [0.25, 0.1, 0.1]


def test_steps_along_the_momentum_follow_it_too(backend: str) -> None:
    """With a radius of their own, beside K-SAM's constant one."""
    model, twin = network(), network()
    mixed = KSAM(
        model.parameters(), torch.optim.SGD, rho=0.0, k=1.0, when=EveryNth(100),
        otherwise=Momentum(ByLearningRate(0.3)), **SGD,
    )  # fmt: skip
    alone = MSAM(twin.parameters(), torch.optim.SGD, rho=ByLearningRate(0.3), **SGD)
    for optimizer in (mixed, alone):
        lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    # The first is K-SAM's with radius 0, as MSAM's, which has no momentum yet.
    for _ in range(3):
        mixed.step(loss_of(model), batch())
        alone.step(loss_of(twin), batch())
    assert mixed.param_groups[0]["rho"] == 0.0
    assert all_same_bits(weights(model), weights(twin))
    constant = network()
    other = MSAM(constant.parameters(), torch.optim.SGD, rho=0.3, lr=0.2, momentum=0.9)
    for _ in range(3):
        other.step(loss_of(constant), batch())
    assert not all_same_bits(weights(constant), weights(twin))


def test_the_peak_may_be_that_of_a_step_that_another_part_took(backend: str) -> None:
    model = network()
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, k=8,
        when=lambda step: step == 0, otherwise=Momentum(ByLearningRate(0.3)),
    )  # fmt: skip
    optimizer.step(loss_of(model), batch())
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.step(loss_of(model), batch())
    assert optimizer.param_groups[0]["peak_lr"] == 0.2


def test_it_may_be_that_of_a_plain_step(backend: str) -> None:
    """Before the first step that climbs along the momentum."""
    model = network()
    optimizer = SharpnessAware(
        model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, descent=All(),
        ascent=Momentum(ByLearningRate(0.3)), when=lambda step: step > 0,
    )  # fmt: skip
    optimizer.step(loss_of(model), batch())
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.step(loss_of(model), batch())
    assert optimizer.param_groups[0]["peak_lr"] == 0.2


@pytest.mark.parametrize(
    ("rho", "error"), [(-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_a_radius_out_of_range_is_refused(rho: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"rho .*{rho}"):
        ByLearningRate(rho)


def test_a_learning_rate_that_is_none_is_refused(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, rho=ByLearningRate(1.0), **SGD)
    before = weights(model)
    for wrong in (float("nan"), float("inf")):
        optimizer.param_groups[0]["lr"] = wrong
        with pytest.raises(ValueError, match=f"lr .*{wrong}"):
            optimizer.step(loss_of(model), batch())
        assert all_same_bits(weights(model), before)


def test_a_rate_that_is_a_tensor_is_read(backend: str) -> None:
    model = network()
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, rho=ByLearningRate(1.0), lr=torch.tensor(0.5),
        foreach=True,
    )  # fmt: skip
    optimizer.step(loss_of(model), batch())
    optimizer.param_groups[0]["lr"].mul_(0.25)
    optimizer.step(loss_of(model), batch())
    assert optimizer.param_groups[0]["rho"] == 0.25


@pytest.mark.parametrize("rho", [True, "0.1"])
def test_a_radius_that_is_no_number_is_refused(rho: Any) -> None:
    with pytest.raises(TypeError, match=f"rho .*{rho}"):
        KSAM(network().parameters(), torch.optim.SGD, lr=0.1, rho=rho)


@pytest.mark.parametrize(
    ("rho", "error"), [(-0.1, ValueError), (float("nan"), ValueError), (None, TypeError)]
)
def test_a_schedule_that_gives_no_radius_is_refused(
    backend: str, rho: Any, error: type[Exception]
) -> None:
    model = network()
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=lambda step: 0.1 if step == 0 else rho
    )
    optimizer.step(loss_of(model), batch())
    before = weights(model)
    with pytest.raises(error, match=f"rho .*{rho}"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)


def test_a_radius_along_the_momentum_may_be_a_function_of_the_step(backend: str) -> None:
    def rho(step: int) -> float:
        return 0.1 * step

    model, twin = network(), network()
    mixed = KSAM(
        model.parameters(), torch.optim.SGD, when=lambda step: False, otherwise=Momentum(rho), **SGD
    )
    alone = MSAM(twin.parameters(), torch.optim.SGD, rho=rho, **SGD)
    for step in range(4):
        mixed.step(loss_of(model), batch(step))
        alone.step(loss_of(twin), batch(step))
    assert all_same_bits(weights(model), weights(twin))


def ramp(step: int) -> float:
    """A schedule that pickles."""
    return (step + 1) / 8


def grouped(rho: Any = 0.5) -> tuple[torch.nn.Module, KSAM]:
    """A group for each parameter; that of the third follows a schedule of its own."""
    model = network()
    groups: list[dict[str, Any]] = [{"params": [p]} for p in model.parameters()]
    groups[2]["rho"] = ramp
    return model, KSAM(groups, torch.optim.SGD, rho=rho, **SGD)


def radii(optimizer: KSAM) -> list[float]:
    return [group["rho"] for group in optimizer.param_groups]


def test_a_schedule_put_into_a_group_is_followed(backend: str) -> None:
    model, optimizer = grouped()
    optimizer.param_groups[0]["rho"] = ramp
    optimizer.param_groups[1]["rho"] = ByLearningRate(0.25)
    for step in range(3):
        optimizer.step(loss_of(model), batch())
        assert radii(optimizer) == [ramp(step), 0.25, ramp(step), 0.5]
    optimizer.param_groups[1]["lr"] /= 2
    optimizer.step(loss_of(model), batch())
    assert radii(optimizer) == [ramp(3), 0.125, ramp(3), 0.5]


def test_a_schedule_put_into_a_group_is_not_in_the_checkpoint_but_what_it_gives() -> None:
    _, optimizer = grouped()
    optimizer.param_groups[0]["rho"] = lambda step: 0.75
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0]["rho"] == 0.75


@pytest.mark.parametrize(("rho", "error"), [("1", TypeError), (lambda step: -1.0, ValueError)])
def test_what_is_no_radius_is_refused_in_a_group_too(
    backend: str, rho: Any, error: type[Exception]
) -> None:
    model, optimizer = grouped()
    before = weights(model)
    optimizer.param_groups[0]["rho"] = rho
    with pytest.raises(error, match="rho must be"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)
    optimizer.param_groups[0]["rho"] = 0.125
    optimizer.step(loss_of(model), batch())
    assert radii(optimizer) == [0.125, 0.5, ramp(0), 0.5]


def copied(optimizer: KSAM, how: str) -> KSAM:
    if how == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
        return optimizer
    return copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("how", ["loaded", "deepcopy", "pickle"])
def test_groups_keep_their_radii_where_others_are_deleted_or_they_are_sorted(
    backend: str, how: str
) -> None:
    def function(b: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the parameters that are left."""
        left = [p for group in optimizer.param_groups for p in group["params"]]
        return b["x"][:, 0].square() * sum(p.square().sum() for p in left)

    optimizer = copied(grouped()[1], how)
    optimizer.step(function, batch())
    for p in optimizer.param_groups[1]["params"]:
        del optimizer.state[p]  # torch saves no state of parameters that are in no group
    del optimizer.param_groups[1]
    optimizer.step(function, batch())
    assert radii(optimizer) == [0.5, ramp(1), 0.5]
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["rho"] = 0.25
    optimizer = copied(optimizer, how)
    optimizer.step(function, batch())
    assert radii(optimizer) == [0.25, ramp(2), 0.5]
    del optimizer.param_groups[0]
    optimizer.step(function, batch())
    assert radii(optimizer) == [ramp(3), 0.5]


def test_a_group_that_is_thinned_out_keeps_its_schedule(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, rho=ramp, **SGD)
    [group] = optimizer.param_groups
    group["params"] = group["params"][1:]
    for _ in range(2):
        optimizer.step(loss_of(model), batch())
    assert radii(optimizer) == [ramp(1)]


def test_parameters_that_come_back_have_the_radius_of_their_new_group(backend: str) -> None:
    model, optimizer = grouped()
    [late] = optimizer.param_groups.pop(2)["params"]
    optimizer.add_param_group({"params": late})
    optimizer.step(loss_of(model), batch())
    assert radii(optimizer) == [0.5] * 4


@pytest.mark.parametrize("rho", [0.1, lambda step: 0.1], ids=["number", "schedule"])
def test_the_next_method_over_a_base_has_its_own_radius(backend: str, rho: Any) -> None:
    """What a group brought itself stays."""
    first, *others = network().parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "rho": 0.2}]
    base = torch.optim.SGD(groups, **SGD)
    methods: list[tuple[type[Any], dict[str, Any], float]] = [
        (KSAM, {"rho": rho}, 0.1),
        (MSAM, {"rho": 3.0}, 3.0),
        (MSAM, {}, 0.3),
    ]
    for method, options, expected in methods:
        found = [group["rho"] for group in method(None, base, **options).param_groups]
        assert found == [expected, 0.2]
