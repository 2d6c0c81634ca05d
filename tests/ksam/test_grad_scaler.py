"""Steps with a GradScaler: the same step at any scale, and none where gradients overflow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ksam import ESAM, KSAM, MSAM, OrderedSGD, SharpnessAware
from tests.device import DEVICE
from tests.helpers import all_same_bits
from tests.ksam.models import (
    BASES,
    SCALE,
    Batch,
    batch,
    gradients,
    loss_of,
    network,
    scaler,
    tensors_of_state,
    weights,
)


class WithTable(torch.nn.Module):
    """A network over a table of which a batch reads some rows."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 5)
        self.table = torch.nn.Embedding(9, 4, sparse=sparse)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(36).reshape(9, 4).sin())
            self.head.weight.copy_(torch.arange(20).reshape(5, 4).cos())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.flatten(1)[:, 0].abs().mul(4).long().clamp_max(8)))


@pytest.mark.parametrize("factor", [None, 1.0, float("inf")])
def test_sparse_gradients_are_for_the_base_s_own_step(backend: str, factor: float | None) -> None:
    """All of it or, where the scaler finds one that is not finite, none."""
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = WithTable(sparse)
        groups = [{"params": model.head.parameters()}, {"params": model.table.parameters()}]
        scaling = {} if factor is None else {"grad_scaler": scaler()}
        optimizer = OrderedSGD(groups, torch.optim.SGD, q=5, lr=0.1, **scaling)
        before = weights(model)
        optimizer.step(times(factor or 1.0, 0, loss_of(model)), batch())
        assert all_same_bits(weights(model), before) == (factor == float("inf"))
        assert model.table.weight.grad.is_sparse == sparse
        found.append(weights(model))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def times(factor: float, call: int, loss: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """The loss, times a factor in the call of that number."""
    calls = iter(range(10))
    return lambda b: loss(b) * (factor if next(calls) == call else 1.0)


@pytest.mark.parametrize(
    ("method", "enabled"), [(KSAM, True), (KSAM, False), (MSAM, True), (ESAM, True)]
)
@pytest.mark.parametrize(("base", "options"), BASES)
def test_a_power_of_two_changes_no_bit(
    backend: str,
    method: type[SharpnessAware],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    enabled: bool,
) -> None:
    if method is MSAM and base is torch.optim.RMSprop:
        options = {**options, "momentum": 0.9}
    model, twin = network(), network()
    plain = method(model.parameters(), base, **options)
    grad_scaler = scaler(enabled=enabled)
    scaled = method(twin.parameters(), base, grad_scaler=grad_scaler, **options)
    for step in range(4):
        expected = plain.step(loss_of(model), batch(step))
        result = scaled.step(loss_of(twin), batch(step))
        grad_scaler.update()
        assert all_same_bits(weights(model), weights(twin))
        assert all_same_bits(gradients(plain), gradients(scaled))
        assert torch.equal(result.grad_norm, expected.grad_norm)
        assert torch.equal(result.losses, expected.losses)


@pytest.mark.parametrize(("base", "options"), BASES)
def test_an_overflow_of_the_descent_gradient_changes_the_scale_alone(
    backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model, twin = network(), network()
    grad_scaler = scaler()
    optimizer = KSAM(model.parameters(), base, grad_scaler=grad_scaler, **options)
    calm = KSAM(twin.parameters(), base, **options)
    # torch's fused SGD never initializes its momentum where the first step of all overflows.
    overflows = range(1, 3) if "fused" in options else range(2)
    for step in range(3):
        before, state = weights(model), tensors_of_state(optimizer)
        if step in overflows:
            scale = grad_scaler.get_scale()
            optimizer.step(times(1e38, 2, loss_of(model)), batch(9))
            grad_scaler.update()
            assert grad_scaler.get_scale() == scale / 2
            assert all_same_bits(weights(model), before)
            # Before the first update there may be no state, or one as good as none.
            assert step == 0 or all_same_bits(tensors_of_state(optimizer), state)
        optimizer.step(loss_of(model), batch(step))
        grad_scaler.update()
        calm.step(loss_of(twin), batch(step))
        assert all_same_bits(weights(model), weights(twin))
    assert all_same_bits(tensors_of_state(optimizer), tensors_of_state(calm))


def test_an_overflow_of_the_ascent_gradient_leaves_the_step_unperturbed(backend: str) -> None:
    model, twin = network(), network()
    grad_scaler = scaler()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    optimizer = KSAM(model.parameters(), torch.optim.SGD, grad_scaler=grad_scaler, **options)
    flat = KSAM(twin.parameters(), torch.optim.SGD, rho=0.0, **options)
    result = optimizer.step(times(1e38, 1, loss_of(model)), batch())
    grad_scaler.update()
    flat.step(loss_of(twin), batch())
    assert not torch.isfinite(result.grad_norm)
    assert grad_scaler.get_scale() == SCALE  # the update's gradient was finite
    assert all_same_bits(weights(model), weights(twin))


def test_float16_gradients_too_small_to_hold_are_held(backend: str) -> None:
    """Gradients of some 1e-8 a logit are below float16's smallest number, 6e-8."""

    def norm(dtype: torch.dtype, **options: Any) -> float:
        model = network()
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)

        def loss(b: Batch) -> Tensor:
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                return loss_of(model)(b) * 1e-7

        return float(optimizer.step(loss, batch()).grad_norm)

    exact = norm(torch.float32)
    assert exact > 0
    assert norm(torch.float16) < 0.5 * exact
    # Each of a few products is rounded to 11 bits, and a sum's terms mostly cancel no digits here.
    assert norm(torch.float16, grad_scaler=scaler(2.0**20)) == pytest.approx(exact, rel=2**-7)


def test_a_forgotten_update_is_told_and_loses_nothing(backend: str) -> None:
    model = network()
    grad_scaler = scaler()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, grad_scaler=grad_scaler)
    optimizer.step(loss_of(model), batch(0))
    before = weights(model)
    with pytest.raises(RuntimeError, match="after step"):
        optimizer.step(loss_of(model), batch(1))
    assert all_same_bits(weights(model), before)
    grad_scaler.update()
    optimizer.step(loss_of(model), batch(1))
    assert not all_same_bits(weights(model), before)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("updates", [True, False])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_step_after_one_that_failed_in_the_base(
    backend: str, base: type[torch.optim.Optimizer], updates: bool, enabled: bool
) -> None:
    model, twin = network(), network()
    grad_scaler = scaler(enabled=enabled)
    optimizer = KSAM(model.parameters(), base, lr=0.01, grad_scaler=grad_scaler)

    def fails(*_: Any) -> None:
        raise RuntimeError("boom")

    hook = optimizer.base.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step(loss_of(model), batch())
    hook.remove()
    if updates:  # as a loop that catches the error may
        grad_scaler.update()
    optimizer.step(loss_of(model), batch())
    grad_scaler.update()
    KSAM(twin.parameters(), base, lr=0.01).step(loss_of(twin), batch())
    assert all_same_bits(weights(model), weights(twin))


def test_a_copy_has_a_scaler_of_its_own(backend: str) -> None:
    model = network()
    grad_scaler = scaler()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, grad_scaler=grad_scaler)
    optimizer.step(loss_of(model), batch(0))
    grad_scaler.update()
    twin_model, twin, twin_scaler = copy.deepcopy((model, optimizer, grad_scaler))
    for step in range(1, 3):
        optimizer.step(loss_of(model), batch(step))
        grad_scaler.update()
        twin.step(loss_of(twin_model), batch(step))
        twin_scaler.update()
    assert all_same_bits(weights(model), weights(twin_model))


def test_a_scaler_can_be_copied_between_the_two_calls(backend: str) -> None:
    """As before a step of torch's own optimizers: nothing was unscaled."""
    model = network()
    grad_scaler = scaler()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, grad_scaler=grad_scaler)
    optimizer.backward(loss_of(model), batch())
    twin_model, twin, twin_scaler = copy.deepcopy((model, optimizer, grad_scaler))
    twin.backward(loss_of(twin_model), batch())  # a copy of a parameter has no gradient
    grad_scaler.step(optimizer)
    twin_scaler.step(twin)
    assert all_same_bits(weights(model), weights(twin_model))


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler or None"):
        KSAM(network().parameters(), torch.optim.SGD, lr=0.1, grad_scaler=1024.0)
