"""A step is K-SAM: against an independent version, and against SAM and the base optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ksam_kernels
from ksam import KSAM, StepResult
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, noting_weights, plain_ksam_step, weights

BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "foreach": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(1e-2, dtype=torch.float64)}),
    (torch.optim.RMSprop, {"lr": 1e-2}),
]


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("k", [8, 24])  # of 24: K-SAM and SAM
def test_twenty_steps_are_those_of_an_independent_ksam(
    backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any], k: int
) -> None:
    # float64: what differs is rounding only, and the norm, which float32 logits do not touch.
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), base, rho=0.05, k=k, **options)
    plain = base(other.parameters(), **options)
    for step in range(20):
        data = batch(step, dtype=torch.float64)
        optimizer.step(lambda b: F.cross_entropy(model(b["x"]), b["y"], reduction="none"), data)
        plain_ksam_step(other, plain, data, k, rho=0.05)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_the_perturbation_matters_in_the_comparison_above(backend: str) -> None:
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, k=8)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    data = batch(dtype=torch.float64)
    optimizer.step(loss_of(model), data)
    plain_ksam_step(other, plain, data, 8, rho=0.0)
    assert not torch.allclose(model[0].weight, other[0].weight, rtol=1e-6)


@pytest.mark.parametrize(("base", "options"), BASES)
def test_rho_zero_and_every_sample_is_the_base_optimizer(
    backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), base, rho=0.0, k=1.0, **options)
    plain = base(other.parameters(), **options)
    for step in range(5):
        data = batch(step, dtype=torch.float64)
        optimizer.step(lambda b: F.cross_entropy(model(b["x"]), b["y"], reduction="none"), data)
        plain.zero_grad()
        F.cross_entropy(other(data["x"]), data["y"]).backward()
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_the_result_describes_the_batch_before_the_step(backend: str) -> None:
    model, data = network(), batch()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8)
    with torch.no_grad():
        expected = ksam_kernels.cross_entropy(model(data["x"]), data["y"])
    result = optimizer.step(lambda b: (loss_of(model)(b), len(b["y"])), data)
    assert isinstance(result, StepResult)
    assert torch.equal(result.losses, expected)
    assert torch.equal(result.loss, expected.mean())
    assert torch.equal(result.indices, ksam_kernels.topk_indices(expected, 8))
    assert result.aux == 24
    assert result.grad_norm.dtype == torch.float32
    assert not result.losses.requires_grad


@pytest.mark.parametrize(("k", "sizes"), [(8, [24, 8, 8]), (24, [24, 24]), (1000, [24, 24])])
def test_the_function_sees_the_batch_then_the_selection_twice(
    backend: str, k: int, sizes: list[int]
) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=k)
    calls: list[tuple[int, bool]] = []

    def per_sample_loss(b: dict[str, Tensor]) -> Tensor:
        calls.append((len(b["y"]), torch.is_grad_enabled()))
        return loss_of(model)(b)

    with torch.no_grad():  # whatever the caller's mode
        optimizer.step(per_sample_loss, batch())
    assert [size for size, _ in calls] == sizes
    assert [grad for _, grad in calls][-2:] == [True, True]
    if len(sizes) == 3:
        assert not calls[0][1]


def test_loss_and_selection_are_one_operator_call(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8)
    separate: list[int] = []
    topk = ksam_kernels.topk_indices
    monkeypatch.setattr(
        ksam_kernels, "topk_indices", lambda losses, k: separate.append(k) or topk(losses, k)
    )
    optimizer.step(loss_of(model), batch())
    assert separate == []

    def reweighted_in_place(b: dict[str, Tensor]) -> Tensor:
        losses = loss_of(model)(b)
        return losses.mul_(b["w"]) if not losses.requires_grad else losses * b["w"]

    data = {**batch(), "w": torch.rand(24)}
    with torch.no_grad():
        expected = loss_of(model)(data) * data["w"]
    result = optimizer.step(reweighted_in_place, data)
    assert separate == [8]
    assert torch.equal(result.indices, topk(expected, 8))


def test_the_descent_gradient_stays_and_a_stale_one_is_discarded(backend: str) -> None:
    model, data = network(dtype=torch.float64), batch(dtype=torch.float64)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.5, k=8)
    optimizer.step(loss_of(model), data)
    for p, w in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), w - 0.5 * p.grad, rtol=1e-12, atol=1e-14)


def test_adaptive_perturbs_as_asam(backend: str) -> None:
    model, data = network(dtype=torch.float64), batch(dtype=torch.float64)
    params = list(model.parameters())
    w = weights(model)
    g = torch.autograd.grad(loss_of(model)(data).mean(), params)
    t = [p.abs() + 0.01 for p in w]
    norm = torch.sqrt(sum((a * b).square().sum() for a, b in zip(t, g, strict=True)))
    function, seen = noting_weights(model)
    options = {"adaptive": True, "eta": 0.01, "rho": 0.5, "k": 1.0}
    result = KSAM(params, torch.optim.SGD, lr=0.1, **options).step(function, data)
    torch.testing.assert_close(result.grad_norm.double(), norm, rtol=1e-6, atol=0)
    for p, w_i, t_i, g_i in zip(seen[1], w, t, g, strict=True):
        # The losses are float32, so is the precision of their gradient.
        torch.testing.assert_close(p, w_i + 0.5 * t_i**2 * g_i / norm, rtol=1e-6, atol=1e-7)


def test_trains_bfloat16_weights(backend: str) -> None:
    model, data = network(dtype=torch.bfloat16), batch(dtype=torch.bfloat16)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, k=8)
    losses = [float(optimizer.step(loss_of(model), data).loss) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert not all_same_bits(weights(model), weights(network(dtype=torch.bfloat16)))
