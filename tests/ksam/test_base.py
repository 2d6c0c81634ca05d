"""The base optimizer: what hangs on it, its options, and the parameters it is built of."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ksam import KSAM, MSAM, cross_entropy
from ksam.update import can_fuse
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, losses, network


def test_a_scheduler_on_the_base_sees_its_steps(backend: str) -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1)
    optimizer = KSAM(None, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler whose optimizer did not step
        optimizer.step(loss_of(model), batch())
        scheduler.step()


def test_hooks_after_the_steps_of_the_base_run(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    ran: list[str] = []
    optimizer.base.register_step_post_hook(lambda *_: ran.append("after"))
    optimizer.step(loss_of(model), batch())
    assert ran == ["after"]


def check_steps(
    optimizer: KSAM, model: nn.Module, plain: torch.optim.Optimizer, twin: nn.Module
) -> None:
    """With radius 0 on all samples they are those of the base optimizer."""
    for step in range(3):
        data = batch(step, dtype=torch.float64)
        optimizer.step(losses(model), data)
        plain.zero_grad()
        losses(twin)(data).mean().backward()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        # On a GPU torch's default is foreach, which refuses such betas.
        {"betas": (torch.tensor(0.8), torch.tensor(0.9)), "foreach": False},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=["betas that are tensors", "decay", "decoupled decay"],
)
def test_options_of_adam_mean_what_they_do_in_adam(backend: str, options: dict[str, Any]) -> None:
    model = network(dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), torch.optim.Adam, rho=0.0, k=1.0, lr=0.01, **options)
    plain = torch.optim.Adam(twin.parameters(), lr=0.01, **options)
    check_steps(optimizer, model, plain, twin)


@pytest.mark.parametrize("option", ["foreach", "fused", "differentiable"])
def test_an_implementation_that_was_asked_for_is_used(option: str) -> None:
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    assert can_fuse(base)
    base.param_groups[0][option] = True
    assert not can_fuse(base)


def test_one_group_that_the_kernels_do_not_take_leaves_all_to_the_base(backend: str) -> None:
    model = network(dtype=torch.float64)
    twin = copy.deepcopy(model)

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        first, *others = net.parameters()
        return [{"params": [first]}, {"params": others, "amsgrad": True}]

    optimizer = KSAM(groups(model), torch.optim.AdamW, rho=0.0, k=1.0, lr=0.01)
    plain = torch.optim.AdamW(groups(twin), lr=0.01)
    check_steps(optimizer, model, plain, twin)
    assert "max_exp_avg_sq" in optimizer.state[model[2].bias]


@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"weight_decay": 0.1})],
    ids=["SGD", "AdamW"],
)
def test_a_learning_rate_may_be_an_element_that_a_scheduler_fills_in(
    backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """The kernels read it, as a CUDA graph asks for, in place of the number that it holds."""
    by_element, by_number = network(), network()
    element = torch.tensor(0.1)
    first = KSAM(by_element.parameters(), base, lr=element, **options)
    second = KSAM(by_number.parameters(), base, lr=0.1, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    for step in range(3):
        second.param_groups[0]["lr"] = element.item()
        first.step(losses(by_element), batch(step))
        second.step(losses(by_number), batch(step))
        assert can_fuse(first.base)
        scheduler.step()
    assert element == 0.1 * 0.5**3
    assert all_same_bits(list(by_element.parameters()), list(by_number.parameters()))


@pytest.mark.parametrize(
    "rate", [torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1, device="meta")], ids=str
)
def test_a_learning_rate_that_the_kernels_cannot_read_is_the_base_s(rate: Tensor) -> None:
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    base.param_groups[0]["lr"] = rate
    assert not can_fuse(base)


def test_parameters_that_share_memory_are_refused() -> None:
    first = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="params 0 and 1 share memory; use one Parameter"):
        KSAM([first, nn.Parameter(first.data[2:])], torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base's
        with pytest.raises(ValueError, match="params 0 and 1 share memory; pass it once"):
            KSAM([first, first], torch.optim.SGD, lr=0.1)


def test_the_steps_of_parameters_count_where_they_end() -> None:
    big = torch.ones(64)
    with pytest.raises(ValueError, match="params 0 and 1 share memory"):
        KSAM([nn.Parameter(big[::16]), nn.Parameter(big[32:36])], torch.optim.SGD, lr=0.1)


def test_parameters_without_memory_share_none() -> None:
    with torch.device("meta"):
        model = network()
    KSAM(model.parameters(), torch.optim.SGD, lr=0.1)


def test_parameters_taken_out_of_the_groups_are_forgotten(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    kept = []
    for step in range(3):
        late = nn.Parameter(torch.ones(5))
        kept.append(weakref.ref(late))
        optimizer.add_param_group({"params": [late]})
        optimizer.step(lambda b, w=late: cross_entropy(model(b["x"]) * w, b["y"]), batch(step))
        optimizer.zero_grad()
        del optimizer.param_groups[1], late
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
    optimizer.step(loss_of(model), batch())
    gc.collect()
    assert [ref() for ref in kept[:-1]] == [None, None]


def test_parameters_side_by_side_in_one_buffer_are_served() -> None:
    flat = torch.ones(8)
    halves = [nn.Parameter(flat[:4]), nn.Parameter(flat[4:])]
    assert KSAM(halves, torch.optim.SGD, lr=0.1).param_groups[0]["params"] == halves


def test_a_base_that_is_built_has_the_named_parameters_it_was_built_of() -> None:
    model = network()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = KSAM(model.named_parameters(), base)
    assert optimizer.param_groups is base.param_groups
    with pytest.raises(ValueError, match="params must be None or the 4 parameters of base"):
        KSAM(network().named_parameters(), base)


def test_a_base_without_defaults_is_refused() -> None:
    """As wrappers are that call no constructor of Optimizer's, PostLocalSGDOptimizer for one."""

    class Bare(torch.optim.Optimizer):
        def __init__(self, wrapped: torch.optim.Optimizer) -> None:
            self.param_groups = wrapped.param_groups

    base = Bare(torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"^base must have defaults, .*got Bare without"):
        KSAM(None, base)


def test_the_parameters_of_a_new_group_may_come_from_a_generator() -> None:
    late = nn.Linear(2, 2)
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1)
    optimizer.add_param_group({"params": late.parameters()})
    assert optimizer.param_groups[1]["params"] == list(late.parameters())


def test_a_set_of_parameters_is_refused_as_it_has_no_order() -> None:
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="sets"):
        optimizer.add_param_group({"params": set(nn.Linear(2, 2).parameters())})
    assert len(optimizer.param_groups) == 1


class NeedsLoss(torch.optim.SGD):
    def step(self, loss: Any, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


class TakesAnything(torch.optim.SGD):
    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().step(*args, **kwargs)


def test_a_base_whose_step_needs_arguments_is_refused(backend: str) -> None:
    model = network()
    inner = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"base must not be sharpness-aware .* got KSAM"):
        KSAM(None, inner)
    with pytest.raises(TypeError, match=r"base must not be sharpness-aware .* got MSAM"):
        KSAM(model.parameters(), MSAM, lr=0.1)
    with pytest.raises(
        TypeError, match=r"base must step .* got NeedsLoss, whose step\(\) needs a loss"
    ):
        KSAM(model.parameters(), NeedsLoss, lr=0.1)
    KSAM(model.parameters(), TakesAnything, lr=0.1).step(loss_of(model), batch())


def test_a_group_added_to_a_copy_has_the_radius_of_the_original() -> None:
    clone = copy.deepcopy(KSAM(network().parameters(), torch.optim.SGD, lr=0.1, rho=0.3))
    clone.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert clone.param_groups[1]["rho"] == 0.3


def test_a_checkpoint_of_the_plain_base_leaves_the_radius() -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    optimizer.param_groups[0]["rho"] = 0.2
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.2
