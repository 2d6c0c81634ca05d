"""What an optimizer cannot be built of is refused, by name and value; what its defaults are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ksam
from ksam import (
    ASAM,
    AUSAM,
    ESAM,
    KSAM,
    MSAM,
    SAM,
    AutoKSAM,
    Diagnostics,
    From,
    ImportanceKSAM,
    Momentum,
    OrderedSGD,
    RandomSubsetSAM,
    Representative,
    SharpnessAware,
    StaleKSAM,
)
from ksam.geometry import Geometry, NamedAdaptive, StochasticWeights, named_weight
from ksam.samplers import All, Importance, LossIncrease, Ordered, Random, TopK
from ksam.tables import SharpnessSample, StaleTopK
from tests.ksam.models import NAMES, batch, build, loss_of, network


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ascent": None}, ValueError, "descent must be given .*ascent=None"),
        ({"ascent": Momentum()}, ValueError, "descent must be given .*ascent=<.*Momentum"),
        ({"ascent": 0.3}, TypeError, r"ascent must be a Sampler, a Momentum or None, got 0\.3"),
        ({"descent": "all"}, TypeError, "descent must be a Sampler or None, got 'all'"),
        ({"geometry": 1}, TypeError, "geometry must be a Geometry, got 1"),
        ({"model": {}}, TypeError, r"model must be a torch\.nn\.Module or None, got {}"),
        ({"when": 3}, TypeError, "when must be a function of the step or a policy, got 3"),
        ({"when": From}, TypeError, "when must be a function .* got <class .*From"),
        ({"when": Representative}, TypeError, "when must be .*policy, got <class .*Representative"),
        ({"seed": 1.0}, TypeError, r"seed must be an int .*1\.0"),
        ({"seed": True}, TypeError, "seed must be an int .*True"),
        ({"seed": -1}, ValueError, "seed must be in .*-1"),
        ({"seed": 2**31}, ValueError, "seed must be in .*2147483648"),
    ],
)
def test_arguments_are_checked(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SharpnessAware(
            network().parameters(), torch.optim.SGD, lr=0.1, **{"ascent": All(), **arguments}
        )


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("statistics", "typo", ValueError, "statistics must be one of .*'typo'"),
        ("scale", "sum", ValueError, "scale must be one of .*'sum'"),
        ("micro_batch_size", 0, ValueError, "micro_batch_size must be >= 1, got 0"),
        ("model", {}, TypeError, r"model must be a torch\.nn\.Module or None, got {}"),
        ("descent", LossIncrease(8), ValueError, "ascent must evaluate the whole batch"),
        ("geometry", None, TypeError, "geometry must be a Geometry, got None"),
        ("geometry", NamedAdaptive(), ValueError, "params must have names, .* got none for"),
        ("when", 3, TypeError, "when must be a function of the step or a policy, got 3"),
        ("seed", -1, ValueError, "seed must be in .*-1"),
        ("k", 0, ValueError, "k as a count must be >= 1, got 0"),
        ("rho", 7, AttributeError, "rho must be set in param_groups, per group, got rho = 7"),
    ],
)
def test_what_is_set_later_is_checked_alike(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    model = network()
    optimizer = StaleKSAM(
        model.parameters(), torch.optim.SGD, dataset_size=24, index="index", lr=0.1
    )
    for each in (optimizer, copy.deepcopy(optimizer)):
        before = dict(vars(each))
        with pytest.raises(error, match=message):
            setattr(each, name, value)
        assert vars(each) == before


def test_what_is_set_later_counts() -> None:
    model = network(batchnorm=True)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.model, optimizer.when, optimizer.micro_batch_size = model, From(1), 5
    with pytest.raises(ValueError, match="base must have momentum"):
        optimizer.otherwise = Momentum()
    assert [optimizer.step(loss_of(model), batch()).sharp for _ in range(2)] == [False, True]
    assert model[1].num_batches_tracked == 10


@pytest.mark.parametrize("scale", ["batch", "share"])
@pytest.mark.parametrize("method", [OrderedSGD, ImportanceKSAM])
def test_a_loss_that_is_as_it_should_be_has_one_scale(method: type[Any], scale: str) -> None:
    with pytest.raises(ValueError, match=f'scale must be "mean" with .*{scale}'):
        method(network().parameters(), torch.optim.SGD, lr=0.1, scale=scale)


def built(ascent: Any, descent: Any, model: nn.Module) -> SharpnessAware:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    return SharpnessAware(
        model.parameters(), torch.optim.SGD, ascent=ascent, descent=descent, **options
    )


def stale() -> StaleTopK:
    return StaleTopK(8, 24, "index")


def sharpness() -> SharpnessSample:
    return SharpnessSample(8, 24, "index")


@pytest.mark.parametrize(
    ("ascent", "descent", "message"),
    [
        (LossIncrease(8), None, "ascent must not be LossIncrease.* pass it as descent"),
        (LossIncrease(8), All(), "ascent must not be LossIncrease.* pass it as descent"),
        *(
            (ascent, LossIncrease(8), f"ascent must evaluate the whole batch .*got .*{name}")
            for ascent, name in [
                (Random(8), "Random"),
                (stale(), "StaleTopK"),
                (sharpness(), "SharpnessSample"),
                (Momentum(), "Momentum"),
                (None, "None"),
            ]
        ),
        (All(), sharpness(), "descent must not be SharpnessSample.* pass it as ascent"),
        (sharpness(), sharpness(), "descent must not be SharpnessSample.* pass it as ascent"),
        (sharpness(), All(), "descent must be None with ascent=SharpnessSample"),
        (sharpness(), TopK(8), "descent must be None with ascent=SharpnessSample"),
    ],
)
def test_parts_that_compare_losses_are_refused_where_they_cannot(
    ascent: Any, descent: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        built(ascent, descent, network())


SAMPLERS: dict[str, Callable[[], Any]] = {
    "All": All,
    "TopK": lambda: TopK(8),
    "Random": lambda: Random(8),
    "Importance": lambda: Importance(8),
    "Ordered": lambda: Ordered(8),
    "StaleTopK": stale,
}
#: Where they may stand, as documented.
TOGETHER = [
    *((ascent, descent) for ascent in SAMPLERS for descent in SAMPLERS),
    *((ascent, None) for ascent in (*SAMPLERS, "SharpnessSample")),
    *((ascent, descent) for ascent in ("Momentum", None) for descent in SAMPLERS),
    *((ascent, "LossIncrease") for ascent in ("All", "TopK", "Importance", "Ordered")),
]


@pytest.mark.parametrize(("ascent", "descent"), TOGETHER)
def test_all_other_parts_go_together(ascent: str | None, descent: str | None) -> None:
    others = {
        "SharpnessSample": sharpness,
        "Momentum": Momentum,
        "LossIncrease": lambda: LossIncrease(6),
    }
    make: dict[str | None, Callable[[], Any]] = {**SAMPLERS, **others, None: lambda: None}
    model = network()
    optimizer = built(make[ascent](), make[descent](), model)
    optimizer.report_share = True
    for step in range(3):
        data = {**batch(step), "index": torch.arange(24)}
        result = optimizer.step(loss_of(model), data)
        assert len(result.indices) == optimizer.num_selected(24, step)


def test_a_base_with_a_rho_of_its_own_is_refused() -> None:
    base = torch.optim.Adadelta(network().parameters(), rho=0.8)
    with pytest.raises(ValueError, match=r"base must not .* named rho.* Adadelta with rho=0\.8"):
        KSAM(None, base)


def test_maximizing_is_refused() -> None:
    model, late = network(), nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="maximize must be False, got True"):
        KSAM(model.parameters(), torch.optim.SGD, lr=0.1, maximize=True)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="maximize must be False, got True"):
        optimizer.add_param_group({"params": late, "maximize": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", NAMES)
def test_options_that_nobody_takes_are_named(name: str) -> None:
    message = r"momntum is not an argument of the method or of its base, (SGD|Adam), got 0\.9"
    with pytest.raises(TypeError, match=message):
        build(name, network(), momntum=0.9)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_parameters_are_refused(name: str) -> None:
    model = network()
    optimizer = build(name, model)
    late = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"dense, got layout torch.sparse_coo for .*'late'"):
        optimizer.add_param_group({"params": [("late", late)]})
    model.register_parameter("z", late)
    message = (
        r"params must be dense, got layout torch.sparse_coo for parameter 0 .*'z', .* \(3, 3\)"
    )
    with pytest.raises(TypeError, match=message):
        build(name, model)


@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters_are_refused_unless_they_are_frozen(name: str) -> None:
    model = network()
    model.register_parameter("z", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    message = r"params must be real, got torch.complex64 for parameter 0 .*'z', of shape \(3,\)"
    with pytest.raises(TypeError, match=message):
        build(name, model)
    model.z.requires_grad_(False)
    optimizer = build(name, model)
    late = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"complex128 for parameter 1 .*'late'"):
        optimizer.add_param_group({"params": [("w", nn.Parameter(torch.ones(()))), ("late", late)]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=r"complex128 for parameter 0 of its group of shape \(2,\)"):
        KSAM([late], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("name", ["Adam", "Adamax", "NAdam", "RAdam"])
def test_a_base_with_betas_has_a_direction(backend: str, name: str) -> None:
    model = network()
    optimizer = MSAM(model.parameters(), getattr(torch.optim, name), lr=0.01)
    norms = [float(optimizer.step(loss_of(model), batch()).grad_norm) for _ in range(2)]
    assert norms[0] == 0 < norms[1]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("KSAM", "ascent"),
        ("KSAM", "geometry"),
        ("AutoKSAM", "when"),
        ("AutoKSAM", "otherwise"),
        ("AutoKSAM", "ascent"),
        ("ImportanceKSAM", "ascent"),
        ("SAM", "ascent"),
        ("ASAM", "geometry"),
        ("ESAM", "descent"),
        ("RandomSubsetSAM", "descent"),
        ("OrderedSGD", "rho"),
        ("MSAM", "descent"),
        ("StaleKSAM", "ascent"),
        ("AUSAM", "ascent"),
    ],
)
def test_what_a_method_sets_is_not_given_to_it(name: str, option: str) -> None:
    table = {"dataset_size": 24, "index": "index"} if name in ("StaleKSAM", "AUSAM") else {}
    arguments = {"lr": 0.1, "momentum": 0.9, **table, option: None}
    with pytest.raises(TypeError, match=rf"^{option} must not be given to {name}, .*got None"):
        getattr(ksam, name)(network().parameters(), torch.optim.SGD, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_members_of_a_class_can_be_listed(name: str) -> None:
    """As help() and the makers of documentation do, without an optimizer."""
    assert "step" in dict(inspect.getmembers(getattr(ksam, name)))


def test_defaults_reach_the_parts() -> None:
    params = [*network().parameters()]
    auto = AutoKSAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert isinstance(auto.when, Representative)
    assert (auto.when.threshold, auto.when.every, auto.when.budget) == (0.9, 10, 1.0)
    assert auto.k == 1 / 3
    assert KSAM(params, torch.optim.SGD, lr=0.1).k == 1 / 3
    assert ESAM(params, torch.optim.SGD, lr=0.1).num_selected(24) == 12
    assert OrderedSGD(params, torch.optim.SGD, lr=0.1).num_selected(24) == 24


#: As documented, of functions and constructors.
DEFAULTS: dict[Callable[..., Any], dict[str, Any]] = {
    KSAM: {"rho": 0.05, "k": 1 / 3, "adaptive": False, "eta": 0.0, "random": 0.0},
    AutoKSAM: {"momentum_rho": "auto", "threshold": 0.9, "every": 10, "budget": 1.0},
    ImportanceKSAM: {"rho": 0.05, "k": 1 / 3, "uniform": 0.1},
    SAM: {"rho": 0.05, "adaptive": False, "eta": 0.0},
    ASAM: {"rho": 0.5, "eta": 0.01, "scaled": named_weight},
    ESAM: {"rho": 0.05, "beta": 0.5, "gamma": 0.5, "adaptive": False, "eta": 0.0},
    RandomSubsetSAM: {"rho": 0.05, "share": 0.25},
    OrderedSGD: {"q": None},
    MSAM: {"rho": "auto", "adaptive": False, "eta": 0.0},
    StaleKSAM: {"rho": 0.05, "k": 0.5, "refresh": 10},
    AUSAM: {"alpha": 0.5, "rho": 0.1, "low": 0.1, "high": 0.5, "ramp": 30},
    SharpnessAware: {
        **dict.fromkeys(("descent", "geometry", "model", "when", "otherwise", "grad_scaler")),
        "rho": 0.05,
        "scale": "mean",
        "statistics": "subset",
        "micro_batch_size": None,
        "seed": 0,
    },
    SharpnessAware.backward: {"weight": 1.0},
    TopK: {"random": 0.0},
    Importance: {"uniform": 0.1},
    StaleTopK: {"refresh": 10},
    SharpnessSample: {"low": 0.1, "high": 0.5, "ramp": 30},
    Geometry: {"adaptive": False, "eta": 0.0},
    NamedAdaptive: {"eta": 0.01, "scaled": named_weight},
    StochasticWeights: {"beta": 0.5, "adaptive": False, "eta": 0.0},
    Momentum: {"rho": None},
    Representative: {"threshold": 0.9, "every": 10, "budget": 1.0},
    Diagnostics: {
        "writers": (),
        "every": 100,
        "measure_alignment": True,
        "dataset_size": None,
        "index": "index",
    },
    ksam.sharpness: {"rho": 0.05, "directions": 5, "seed": 0},
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__qualname__)
def test_defaults_are_those_of_the_documentation(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert found == DEFAULTS[function]


def test_arguments_reach_the_parts() -> None:
    def built(method: type[Any], **arguments: Any) -> Any:
        return method(network().parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **arguments)

    def check(part: Any, **expected: Any) -> None:
        assert {name: getattr(part, name) for name in expected} == expected

    policy = {"threshold": 0.4, "every": 7, "budget": 1.5}
    check(built(AutoKSAM, **policy).when, **policy)
    assert built(AutoKSAM, budget=None).when.budget is None
    check(built(ImportanceKSAM, uniform=0.3).ascent, uniform=0.3)
    table: dict[str, Any] = {"dataset_size": 24, "index": "index"}
    check(built(StaleKSAM, refresh=4, **table).ascent, refresh=4, dataset_size=24, index="index")
    scores = {"low": 0.2, "high": 0.3, "ramp": 5}
    check(built(AUSAM, **scores, **table).ascent, **scores, dataset_size=24, index="index")
