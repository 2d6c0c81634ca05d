"""Checkpoints: hooks, loads that are refused, and a base optimizer that is used by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ksam import KSAM, AccuracySchedule, AutoKSAM, EveryNth, Momentum, Representative
from ksam.tables import SharpnessSample
from tests.helpers import all_same_bits
from tests.ksam.models import SIZE, batch, build, data_of, loss_of, losses, network, weights


def hooked(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What its four hooks saw, in a save and a load; those that may replace a state do."""
    seen: list[Any] = []

    def replaces(name: str, state: dict[str, Any]) -> dict[str, Any]:
        seen.append((name, sorted(set(state) - {"ksam"})))
        return {**state, name: 1}

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saves"))
    optimizer.register_state_dict_post_hook(lambda _, state: replaces("saved", state))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: replaces("loads", state))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    return seen


def test_hooks_run_as_those_of_any_optimizer() -> None:
    expected = hooked(torch.optim.SGD(network().parameters(), lr=0.1))
    assert hooked(KSAM(network().parameters(), torch.optim.SGD, lr=0.1)) == expected
    assert len(expected) == 4


def test_what_a_hook_gives_in_place_of_a_state_is_loaded() -> None:
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1)

    def other_rate(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.3} for group in state["param_groups"]]
        return {**state, "param_groups": groups, "ksam": {**state["ksam"], "steps_done": 7}}

    optimizer.register_load_state_dict_pre_hook(other_rate)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.steps_done == 7


@pytest.mark.parametrize("wrong", ["part", "groups", "steps"])
def test_a_load_that_fails_changes_nothing(backend: str, wrong: str) -> None:
    """Also in parts that were loaded before the failure: here the table and the policy."""
    model = network(dtype=torch.float64)
    optimizer = build("StaleKSAM", model, when=Representative(0.0, every=1, budget=None))
    sharp = [optimizer.step(losses(model), data_of(step)).sharp for step in range(3)]
    assert sharp == [False, True, True]
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(build("StaleKSAM", network()).state_dict())
    if wrong == "part":
        state["ksam"]["when"] = {"on": True}
    elif wrong == "groups":
        state["param_groups"].append(state["param_groups"][0])
    else:
        state["ksam"]["steps_done"] = "three"
    twin = copy.deepcopy(optimizer)
    with pytest.raises((KeyError, ValueError)):
        optimizer.load_state_dict(state)
    assert optimizer.steps_done == 3
    after = optimizer.state_dict()
    assert after.pop("param_groups") == before.pop("param_groups")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for step in range(3):
        optimizer.step(losses(model), data_of(step))
        twin.step(losses(twin.model), data_of(step))  # type: ignore[arg-type]
    assert all_same_bits(weights(model), weights(twin.model))  # type: ignore[arg-type]


def test_parts_begin_anew_where_the_checkpoint_has_none() -> None:
    """One of a plain base optimizer has none: they are as at step 0."""
    model = network(dtype=torch.float64)
    policy = Representative(every=1)
    optimizer = build("StaleKSAM", model, when=policy)
    fresh = copy.deepcopy(optimizer.state_dict()["ksam"])
    optimizer.step(losses(model), data_of(0))
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    own = optimizer.state_dict()["ksam"]
    assert own["when"] == fresh["when"]
    assert own["steps_done"] == 0
    assert torch.equal(own["ascent"]["loss"], fresh["ascent"]["loss"])


def test_so_do_parts_that_were_set_later() -> None:
    model = network(dtype=torch.float64)
    optimizer = build("StaleKSAM", model)
    table = SharpnessSample(8, SIZE, "index")
    policy = Representative(every=1)
    optimizer.ascent, optimizer.when = table, policy
    fresh = copy.deepcopy(optimizer.state_dict()["ksam"])
    optimizer.step(losses(model), data_of(0))
    assert optimizer.state_dict()["ksam"]["when"] != fresh["when"]
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    assert optimizer.state_dict()["ksam"]["when"] == fresh["when"]
    assert not table.column("count").any()


@pytest.mark.parametrize("name", ["KSAM", "StaleKSAM"])
def test_a_schedule_takes_a_checkpoint_that_has_none(name: str) -> None:
    constant = build(name, network(dtype=torch.float64))
    scheduled = build(name, network(dtype=torch.float64), k=AccuracySchedule())
    scheduled.load_state_dict(constant.state_dict())
    assert scheduled.num_selected(24) == 24


def test_a_constant_takes_a_checkpoint_of_a_schedule() -> None:
    """And keeps to its value; what the schedule knew goes with the checkpoint only."""
    scheduled = build("OrderedSGD", network(), q=AccuracySchedule())
    scheduled.q.accuracy = 0.9
    constant = build("OrderedSGD", network(), q=0.5)
    constant.load_state_dict(scheduled.state_dict())
    assert constant.num_selected(24) == 12


def test_torchs_momentum_gets_no_step_count_where_none_is_needed(backend: str) -> None:
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses(model)(batch()).mean().backward()
    plain.step()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    optimizer.step(loss_of(model), batch())
    assert {key for state in optimizer.state.values() for key in state} == {"momentum_buffer"}


@pytest.mark.parametrize("name", ["param_groups", "state"])
def test_what_is_assigned_is_the_base_s(name: str) -> None:
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1)
    given = copy.copy(getattr(optimizer, name))
    setattr(optimizer, name, given)
    assert getattr(optimizer, name) is given
    assert getattr(optimizer.base, name) is given


def test_the_base_may_load_by_itself(backend: str) -> None:
    """A plain optimizer's checkpoint has no rho, and its groups are new objects."""
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    optimizer.step(loss_of(model), batch())
    optimizer.param_groups[0]["rho"] = 0.2
    optimizer.step(loss_of(model), batch())
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(optimizer.base.state_dict())
    state = plain.state_dict()
    del state["param_groups"][0]["rho"]
    optimizer.base.load_state_dict(state)
    for each, m in ((optimizer, model), copy.deepcopy((optimizer, model))):
        scheduler = torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5)
        for step in range(2):
            each.step(loss_of(m), batch(step))
            scheduler.step()
        assert each.param_groups is each.base.param_groups
        assert each.state is each.base.state
        assert each.base.param_groups[0]["lr"] == 0.025
        assert each.param_groups[0]["rho"] == 0.2


def test_the_base_may_be_given_groups(backend: str) -> None:
    model, late = network(), nn.Parameter(torch.ones(()))
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    optimizer.base.add_param_group({"params": late, "lr": 0.5})
    optimizer.step(lambda b: loss_of(model)(b) * late, batch())
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert late.item() != 1
    optimizer.base.add_param_group({"params": nn.Parameter(torch.ones(())), "maximize": True})
    before = weights(model)
    with pytest.raises(ValueError, match="maximize must be False"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)


class Counts(Momentum):
    """Momentum with a state."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_the_part_of_the_other_steps_has_its_state_in_the_checkpoint() -> None:
    def build(count: int) -> KSAM:
        return KSAM(
            network().parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, when=EveryNth(2),
            otherwise=Counts(count),
        )  # fmt: skip

    resumed = build(0)
    resumed.load_state_dict(build(3).state_dict())
    assert isinstance(resumed.otherwise, Counts)
    assert resumed.otherwise.count == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"momentum": 0.0}, r"base must have momentum .*SGD with momentum=0\.0"),
        ({"maximize": True}, "maximize must be False, got True"),
        ({"rho": -0.5}, r"rho must be .*-0\.5"),
    ],
    ids=["no momentum", "maximize", "rho"],
)
def test_groups_of_a_checkpoint_that_the_method_cannot_take_are_refused(
    backend: str, wrong: dict[str, Any], message: str
) -> None:
    model = network()
    optimizer = AutoKSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(loss_of(model), batch())
    before = copy.deepcopy(optimizer.state_dict())
    state = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9).state_dict()
    state["param_groups"][0].update(wrong)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["ksam"] == before["ksam"]
    assert all_same_bits(
        *([entry["momentum_buffer"] for entry in s["state"].values()] for s in (after, before))
    )


def test_what_a_group_of_a_checkpoint_leaves_out_is_as_the_base_has_it(backend: str) -> None:
    model = network()
    optimizer = AutoKSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    del state["param_groups"][0]["maximize"]
    optimizer.load_state_dict(state)
    optimizer.step(loss_of(model), batch())


class Wrapper(torch.optim.SGD):
    """Keeps its state in a layout of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"inner": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["inner"])


def test_a_base_with_a_layout_of_its_own_is_resumed(backend: str) -> None:
    model, twin = network(), network()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    optimizer, other = (KSAM(m.parameters(), Wrapper, **options) for m in (model, twin))
    for step in range(2):
        optimizer.step(loss_of(model), batch(step))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        o.step(loss_of(m), batch(2))
    assert other.steps_done == 3
    assert all_same_bits(weights(model), weights(twin))
