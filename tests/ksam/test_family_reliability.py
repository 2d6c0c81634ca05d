"""Every method of the family survives faults and resumes, and refuses bad arguments by name."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import ksam
from ksam.arguments import STATISTICS
from tests.helpers import all_same_bits
from tests.ksam import plain
from tests.ksam.models import NAMES, build, data_of, losses, network, weights

CALLS = {"OrderedSGD": 1, "MSAM": 1, "SAM": 2, "ASAM": 2, "RandomSubsetSAM": 2, "AUSAM": 2}


def state(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*weights(model), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("statistics", "error"),
    [("subset", KeyboardInterrupt), *((statistics, RuntimeError) for statistics in STATISTICS)],
)
def test_a_fault_in_any_call_is_as_if_the_step_had_not_been(
    backend: str, statistics: str, name: str, error: type[BaseException]
) -> None:
    model = network(batchnorm=True, dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimizer = build(name, model, statistics=statistics)
    other = build(name, twin, statistics=statistics)
    for failing in range(1, CALLS.get(name, 3) + 1):
        calls = iter(range(1, 10))

        def fails(b: Any, failing: int = failing, calls: Any = calls) -> Any:
            found = losses(model)(b)
            if next(calls) == failing:
                raise error("boom")
            return found

        step = 4 * failing  # where StaleKSAM has its selection pass
        if name == "StaleKSAM":
            optimizer.steps_done = other.steps_done = step
        before = state(model)
        with pytest.raises(error, match="boom"):
            optimizer.step(fails, data_of(failing))
        assert all_same_bits(state(model), before)
        assert model[1].training
        assert model[1].track_running_stats
        for turn in range(2):
            optimizer.step(losses(model), data_of(turn))
            other.step(losses(twin), data_of(turn))
        assert all_same_bits(state(model), state(twin))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(backend: str, name: str, done: int) -> None:
    model = network(batchnorm=True)
    optimizer = build(name, model)
    data = [{**data_of(i), "x": data_of(i)["x"].float()} for i in range(7)]
    for step in range(done):
        optimizer.step(losses(model), data[step])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network(batchnorm=True)
    twin.load_state_dict(saved["model"])
    resumed = build(name, twin)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(done, 7):
        optimizer.step(losses(model), data[step])
        resumed.step(losses(twin), data[step])
    assert all_same_bits(state(model), state(twin))


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent_and_whole(backend: str, name: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = build(name, model)
    optimizer.step(losses(model), data_of(0))
    before = weights(model)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(clone) is type(optimizer)
        clone.step(losses(clone.model), data_of(1))
        assert all_same_bits(weights(model), before)
    twin = copy.deepcopy(optimizer)
    optimizer.step(losses(model), data_of(1))
    twin.step(losses(twin.model), data_of(1))
    assert all_same_bits(weights(model), weights(twin.model))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("KSAM", {"random": 1.5}, ValueError, r"random .*1\.5"),
        ("KSAM", {"scale": "sum"}, ValueError, r"scale must be one of mean, batch, share.*'sum'"),
        ("KSAM", {"statistics": "none"}, ValueError, r"statistics must be one of .*'none'"),
        ("SAM", {"rho": -1.0}, ValueError, r"rho .*-1\.0"),
        ("ASAM", {"eta": -0.1}, ValueError, r"eta .*-0\.1"),
        ("ASAM", {"scaled": "weight"}, TypeError, "scaled must be a function .*'weight'"),
        ("ESAM", {"beta": 0.0}, ValueError, r"beta must be in \(0, 1\], got 0\.0"),
        ("ESAM", {"beta": 2}, ValueError, r"beta must be in \(0, 1\], got 2"),
        ("ESAM", {"beta": float("nan")}, ValueError, r"beta must be in \(0, 1\], got nan"),
        ("ESAM", {"beta": "a"}, TypeError, "beta must be a number, got 'a'"),
        ("ESAM", {"gamma": 1.5}, ValueError, r"gamma .*1\.5"),
        ("RandomSubsetSAM", {"share": 0}, ValueError, r"share .*0"),
        ("OrderedSGD", {"q": -3}, ValueError, r"q .*-3"),
        ("ImportanceKSAM", {"uniform": 0.0}, ValueError, r"uniform .*0\.0"),
        ("StaleKSAM", {"refresh": 0}, ValueError, r"refresh .*0"),
        ("StaleKSAM", {"dataset_size": 0}, ValueError, r"dataset_size .*0"),
        ("AUSAM", {"alpha": 2.0}, ValueError, r"alpha .*2\.0"),
        ("AUSAM", {"low": 0.6}, ValueError, r"low .*0\.6"),
        ("AUSAM", {"high": 0.0}, ValueError, r"high .*got 0\.0"),
        ("AUSAM", {"ramp": True}, TypeError, r"ramp .*True"),
    ],
)
def test_arguments_out_of_range_are_named(
    name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(name, network(), **arguments)


@pytest.mark.parametrize("given", ["names", "model"])
def test_asam_finds_its_weights_by_either(backend: str, given: str) -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    params = model.named_parameters() if given == "names" else model.parameters()
    optimizer = ksam.ASAM(
        params, torch.optim.SGD, lr=0.1, eta=0.02, model=model if given == "model" else None
    )
    optimizer.step(losses(model), data_of(0))
    plain.asam(twin, data_of(0), 0.5, 0.02, [True, False, True, False])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)


def test_asam_needs_names() -> None:
    model = network(dtype=torch.float64)
    other = nn.Parameter(torch.ones(3))
    needed = "params must have names, .* got none for parameter"
    with pytest.raises(ValueError, match=rf"{needed} 0 of its group of shape \(16, 8\)"):
        ksam.ASAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=rf"{needed} 4 of its group of shape \(3,\)"):
        ksam.ASAM([*model.parameters(), other], torch.optim.SGD, lr=0.1, model=model)
    optimizer = ksam.ASAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    with pytest.raises(ValueError, match=rf"{needed} 0 of its group of shape \(3,\)"):
        optimizer.add_param_group({"params": other})
    optimizer.add_param_group({"params": other.requires_grad_(False)})
    optimizer.step(losses(model), data_of(0))


def test_asam_needs_names_of_parameters_that_took_the_place_of_others() -> None:
    model = network(dtype=torch.float64)
    optimizer = ksam.ASAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    model = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"params must have names, .* got 0 names for 4 parameters"
    ):
        optimizer.step(losses(model), data_of(0))
    assert all_same_bits(weights(model), before)


INDEX = torch.arange(24)


@pytest.mark.parametrize("step", [0, 2])  # on the whole batch, on a selection
@pytest.mark.parametrize("name", ["StaleKSAM", "AUSAM"])
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (INDEX.float(), TypeError, "sample index must be int64, int32, got torch.float32"),
        (INDEX[:, None], ValueError, r"one-dimensional, got shape \(24, 1\)"),
        (None, KeyError, r"index must be a key of the batch, a dict, or .*, got 'index'"),
    ],
)
def test_a_bad_sample_index_changes_nothing(
    backend: str, name: str, step: int, index: Any, error: type[Exception], message: str
) -> None:
    changes_nothing(name, step, index, error, message)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("name", ["StaleKSAM", "AUSAM"])
@pytest.mark.parametrize(("index", "wrong"), [(INDEX + 30, 53), (INDEX - 1, -1)])
def test_a_sample_index_out_of_range_changes_nothing(
    backend: str, name: str, step: int, index: torch.Tensor, wrong: int
) -> None:
    message = rf"holds {wrong}, .* of 48 samples|out of bounds"
    changes_nothing(name, step, index, IndexError, message)


def changes_nothing(name: str, step: int, index: Any, error: type[Exception], message: str) -> None:
    """A step with the sample index raises, and that is all."""
    model = network(batchnorm=True, dtype=torch.float64)
    optimizer = build(name, model)
    optimizer.steps_done = step
    before, calls = state(model), []
    data = {**data_of(0), "index": index}
    if index is None:
        del data["index"]
    with pytest.raises(error, match=message):
        optimizer.step(lambda b: (calls.append(b), losses(model)(b))[1], data)
    assert all_same_bits(state(model), before)
    assert optimizer.steps_done == step
    assert not optimizer.state
    assert not calls


def test_an_index_of_another_length_is_refused() -> None:
    optimizer = build("AUSAM", network(dtype=torch.float64), index=lambda b: INDEX[:3])
    with pytest.raises(ValueError, match=r"one entry per sample, \(24,\), got shape \(3,\)"):
        optimizer.step(losses(optimizer.model), data_of(0))  # type: ignore[arg-type]


def test_a_table_of_another_data_set_is_refused() -> None:
    optimizer = build("StaleKSAM", network())
    with pytest.raises(
        ValueError, match=r"loss in state_dict must have .* 10 samples .* got shape \(48,\)"
    ):
        build("StaleKSAM", network(), dataset_size=10).load_state_dict(optimizer.state_dict())
