"""backward() and then step() are the step, and what a loop does between them is done to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksam import KSAM, MSAM, AutoKSAM, From, SharpnessAware
from tests.helpers import all_same_bits
from tests.ksam.models import (
    BASES,
    NAMES,
    Batch,
    batch,
    build,
    data_of,
    fails_in_call,
    gradients,
    loss_of,
    losses,
    network,
    scaler,
    tensors_of_state,
    weights,
)

SGD = {"lr": 0.1, "momentum": 0.9}


def ksam(net: nn.Module, **options: Any) -> KSAM:
    return KSAM(net.parameters(), torch.optim.SGD, k=8, **{"rho": 0.2, **SGD, **options})


def check_same(found: SharpnessAware, expected: SharpnessAware) -> None:
    params = [[p for group in o.param_groups for p in group["params"]] for o in (found, expected)]
    assert all_same_bits(*params)
    assert all_same_bits(gradients(found), gradients(expected))
    assert all_same_bits(tensors_of_state(found), tensors_of_state(expected))
    assert found.steps_done == expected.steps_done


def take(optimizer: SharpnessAware, function: Callable[[Batch], Any], data: Batch) -> Any:
    """A step in two calls; stale gradients are the loop's to clear."""
    optimizer.zero_grad()
    result = optimizer.backward(function, data)
    optimizer.step()
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_family(backend: str, name: str) -> None:
    model, twin = (network(dtype=torch.float64) for _ in range(2))
    optimizer, other = build(name, model), build(name, twin)
    for step in range(6):
        result = take(optimizer, losses(model), data_of(step))
        expected = other.step(losses(twin), data_of(step))
        check_same(optimizer, other)
        assert torch.equal(result.losses, expected.losses)
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.grad_norm, expected.grad_norm)
        assert result.sharp == expected.sharp


@pytest.mark.parametrize(("base", "options"), BASES)
def test_bases(backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    model, twin = network(), network()
    optimizer = KSAM(model.parameters(), base, **options)
    other = KSAM(twin.parameters(), base, **options)
    for step in range(3):
        # The forms of a step may take turns.
        (take if step != 1 else KSAM.step)(optimizer, loss_of(model), batch(step))
        other.step(loss_of(twin), batch(step))
        check_same(optimizer, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: AutoKSAM(
            m.parameters(), torch.optim.SGD, k=8, model=m, every=2, threshold=0.36, budget=None,
            **SGD,
        ),
        lambda m: ksam(m, model=m, statistics="full", when=From(2)),
        lambda m: ksam(m, model=m, micro_batch_size=5),
    ],
    ids=["AutoKSAM", "statistics", "micro-batches"],
)  # fmt: skip
def test_batchnorm_policies_and_micro_batches(
    backend: str, make: Callable[[nn.Module], KSAM]
) -> None:
    model, twin = network(batchnorm=True), network(batchnorm=True)
    optimizer, other = make(model), make(twin)
    sharp = []
    for step in range(8):
        sharp.append(take(optimizer, loss_of(model), batch(step)).sharp)
        assert sharp[-1] == other.step(loss_of(twin), batch(step)).sharp
        check_same(optimizer, other)
        assert all_same_bits([*model.buffers()], [*twin.buffers()])
    assert any(sharp)


def test_weights_are_as_they_were_until_the_step(backend: str) -> None:
    model = network()
    optimizer = ksam(model)
    before = weights(model)
    optimizer.backward(loss_of(model), batch())
    assert all_same_bits(weights(model), before)
    assert not optimizer.state
    optimizer.step()
    assert not any(map(torch.equal, weights(model), before))


@pytest.mark.parametrize("method", [KSAM, MSAM])
def test_gradients_of_several_calls_add_up(backend: str, method: type[SharpnessAware]) -> None:
    """Each is that of a call alone: the second's ascent, too, is along its own gradient."""
    model = network()
    optimizer = method(model.parameters(), torch.optim.SGD, rho=0.2, **SGD)
    take(optimizer, loss_of(model), batch(9))  # MSAM climbs along the momentum
    alone, norms = [], []
    for seed in range(3):
        optimizer.zero_grad()
        norms.append(optimizer.backward(loss_of(model), batch(seed), weight=0.25).grad_norm)
        alone.append(gradients(optimizer))
    optimizer.zero_grad()
    for seed in range(3):
        result = optimizer.backward(loss_of(model), batch(seed), weight=0.25)
        assert torch.equal(result.grad_norm, norms[seed])
    added = [a + b + c for a, b, c in zip(*alone, strict=True)]
    assert all_same_bits(gradients(optimizer), added)
    before = [p.detach().double() for p in model.parameters()]
    momentum = [s["momentum_buffer"].double() for s in optimizer.state.values()]
    optimizer.step()
    for p, w, v, g in zip(model.parameters(), before, momentum, added, strict=True):
        expected = w - 0.1 * (0.9 * v + g.double())
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", ["mean", "batch", "share"])
def test_the_weight_is_that_of_the_gradient(backend: str, scale: Any) -> None:
    model = network()
    optimizer = ksam(model, scale=scale)
    optimizer.backward(loss_of(model), batch())
    whole = gradients(optimizer)
    optimizer.zero_grad()
    optimizer.backward(loss_of(model), batch(), weight=0.125)
    assert all_same_bits(gradients(optimizer), [g * 0.125 for g in whole])


def test_a_loop_may_clip_the_gradients(backend: str) -> None:
    model = network()
    optimizer = ksam(model)
    base = torch.optim.SGD((twin := network()).parameters(), **SGD)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(loss_of(model), batch(step))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        for net in (model, twin):
            assert nn.utils.clip_grad_norm_(net.parameters(), 0.01) > 0.01
        optimizer.step()
        base.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_call_that_fails_is_as_if_it_had_not_been(backend: str, call: int) -> None:
    """Up to the descent also for the gradient that is there."""
    model, twin = network(batchnorm=True), network(batchnorm=True)
    optimizer, other = ksam(model, model=model), ksam(twin, model=twin)
    for o, m in ((optimizer, model), (other, twin)):
        o.backward(loss_of(m), batch(0))
    before = [*weights(model), *(b.clone() for b in model.buffers())]
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.backward(fails_in_call(model, call, RuntimeError("boom")), batch(1))
    assert all_same_bits([*model.parameters(), *model.buffers()], before)
    assert optimizer.steps_done == 1
    for o, m in ((optimizer, model), (other, twin)):
        o.backward(loss_of(m), batch(2))
        o.step()
    check_same(optimizer, other)


def test_a_step_without_gradients_is_refused(backend: str) -> None:
    """A trainer that knows nothing of backward() would train without any perturbation."""
    model = network()
    optimizer = ksam(model)
    F.cross_entropy(model(batch()["x"]), batch()["y"]).backward()
    before = weights(model)

    def check_refused() -> None:
        with pytest.raises(RuntimeError, match=r"backward.* was not called since the last step"):
            optimizer.step()

    check_refused()
    assert all_same_bits(weights(model), before)
    take(optimizer, loss_of(model), batch())
    check_refused()
    optimizer.backward(loss_of(model), batch())
    optimizer.step(loss_of(model), batch())  # discards what backward() left
    check_refused()
    optimizer.backward(loss_of(model), batch())
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step(fails_in_call(model, 2, RuntimeError("boom")), batch())
    check_refused()


def test_a_function_without_a_batch_is_refused() -> None:
    model = network()
    optimizer = ksam(model)
    function = loss_of(model)
    for wrong, message in [
        ((function, None), "batch must be given with per_sample_loss, got None"),
        ((lambda: 1.0,), r"got None \(pass a closure by name: step\(closure=\.\.\.\)\)"),
        ((5, batch()), "per_sample_loss must be a function of the batch, got 5"),
        ((None, batch()), "per_sample_loss must be a function of the batch, got None"),
        ((batch(), function), "per_sample_loss must be a function of the batch, got {'x': "),
    ]:
        with pytest.raises(TypeError, match=message):
            optimizer.step(*wrong)
        if len(wrong) == 2:
            with pytest.raises(TypeError, match=message):
                optimizer.backward(*wrong)
    with pytest.raises(TypeError, match="closure must be None with per_sample_loss"):
        optimizer.step(function, batch(), closure=lambda: None)  # type: ignore[call-overload]
    assert optimizer.steps_done == 0


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"weight must be finite and >= 0.0, got {weight}"):
        ksam(model).backward(loss_of(model), batch(), weight=weight)


def test_a_closure_is_called_first(backend: str) -> None:
    model, twin = network(), network()
    optimizer, other = ksam(model), ksam(twin)
    with torch.no_grad():
        returned = optimizer.step(
            closure=lambda: (
                torch.is_grad_enabled(),
                optimizer.backward(loss_of(model), batch()).loss,
            )
        )
    assert returned == (True, other.step(loss_of(twin), batch()).loss)
    check_same(optimizer, other)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_a_scaler_takes_the_step(
    backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any], enabled: bool
) -> None:
    """As with any optimizer: unscaled, clipped perhaps, and left out where they overflow."""
    model, twin = network(), network()
    grad_scaler = scaler(enabled=enabled)
    optimizer = KSAM(model.parameters(), base, grad_scaler=grad_scaler, **options)
    other = KSAM(twin.parameters(), base, **options)
    for step in range(4):
        overflows = enabled and step == 2
        optimizer.zero_grad()
        for seed in range(2):
            factor = 1e38 if overflows and seed == 1 else 1.0
            optimizer.backward(
                lambda b, factor=factor: loss_of(model)(b) * factor, batch(2 * step + seed)
            )
        if step == 1:
            grad_scaler.unscale_(optimizer)
        scale, before = grad_scaler.get_scale(), weights(model)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        if overflows:
            assert all_same_bits(weights(model), before)
            assert grad_scaler.get_scale() == scale / 2
            continue
        other.zero_grad()
        for seed in range(2):
            other.backward(loss_of(twin), batch(2 * step + seed))
        other.step()
        assert all_same_bits(weights(model), weights(twin))
        assert all_same_bits(gradients(optimizer), gradients(other))


def test_a_step_with_scaled_gradients_is_refused(backend: str) -> None:
    model = network()
    grad_scaler = scaler()
    optimizer = ksam(model, grad_scaler=grad_scaler)
    optimizer.backward(loss_of(model), batch())
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"call grad_scaler\.step\(optimizer\)"):
        optimizer.step()
    assert all_same_bits(weights(model), before)
    grad_scaler.unscale_(optimizer)
    optimizer.step()
    assert not all_same_bits(weights(model), before)


def test_scaled_gradients_are_not_added_to_unscaled_ones(backend: str) -> None:
    model = network()
    grad_scaler = scaler()
    optimizer = ksam(model, grad_scaler=grad_scaler)
    optimizer.backward(loss_of(model), batch())
    for done in (grad_scaler.unscale_, grad_scaler.step):
        done(optimizer)
        with pytest.raises(RuntimeError, match=r"call grad_scaler\.update\(\)"):
            optimizer.backward(loss_of(model), batch())
    grad_scaler.update()
    optimizer.backward(loss_of(model), batch())


def test_a_scaler_may_come_late(backend: str) -> None:
    """As a trainer makes it, which is given an optimizer that is built."""
    model, twin = network(), network()
    grad_scaler = scaler()
    optimizer, other = ksam(model), ksam(twin, grad_scaler=grad_scaler)
    assert optimizer.grad_scaler is None
    optimizer.grad_scaler = grad_scaler
    assert optimizer.grad_scaler is other.grad_scaler is grad_scaler
    for o, m in ((optimizer, model), (other, twin)):
        o.backward(loss_of(m), batch())
        grad_scaler.step(o)
    check_same(optimizer, other)
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler or None"):
        optimizer.grad_scaler = 1024.0  # type: ignore[assignment]


def test_what_overflowed_in_a_step_that_failed_stops_no_other(backend: str) -> None:
    """A scaler leaves its flag where the step raises."""
    model = network()
    grad_scaler = scaler()
    optimizer = ksam(model, grad_scaler=grad_scaler)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="lr"):
        optimizer.step(lambda b: loss_of(model)(b) * 1e38, batch())
    optimizer.param_groups[0]["lr"] = 0.1
    grad_scaler.update()
    optimizer.zero_grad()
    before = weights(model)
    optimizer.backward(loss_of(model), batch())
    grad_scaler.step(optimizer)
    assert not any(map(torch.equal, weights(model), before))


def test_a_copy_has_no_gradients(backend: str) -> None:
    """A copy of a parameter has none."""
    model = network()
    optimizer = ksam(model)
    optimizer.backward(loss_of(model), batch())
    twin, other = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match="was not called"):
        other.step()
    for o, m in ((optimizer, model), (other, twin)):
        take(o, loss_of(m), batch())
    check_same(other, optimizer)


def test_hooks_and_schedulers_see_the_step(backend: str) -> None:
    model = network()
    optimizer = ksam(model, rho=lambda t: float(t))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            optimizer.backward(loss_of(model), batch(step))
        optimizer.step()
        scheduler.step()
    assert seen == [0.1, 0.05, 0.025]
    assert optimizer.param_groups[0]["rho"] == 5.0  # of the sixth call


def test_other_parameters_keep_their_gradients(backend: str) -> None:
    """The optimizer's alone are put aside and back: also one that no pass gives a gradient."""
    model, unused = network(), nn.Parameter(torch.ones(3))
    optimizer = KSAM([*model.parameters(), unused], torch.optim.SGD, lr=0.1)
    unused.grad = torch.ones(3)
    gradient: Tensor = unused.grad
    optimizer.backward(loss_of(model), batch())
    assert unused.grad is gradient
