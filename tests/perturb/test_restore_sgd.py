"""Contract of ``restore_sgd_``: torch.optim.SGD's update of the backed-up weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ksam_kernels import restore_sgd_
from tests.helpers import FLOATS, all_same_bits, any_bits
from tests.perturb.lists import LAYOUTS, clones, laid_out, like, tensors
from tests.perturb.optim import (
    INF,
    NAN,
    SHAPES,
    Oracle,
    assert_close,
    counters,
    garbage,
    name,
    one,
    zeros_like,
)

GRID = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    for momentum, dampening, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum > 0 and dampening == 0)
]
FULL = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
# Numbers here stay below 8 (normal values, momentum 0.9 over 5 steps); d, v and w have at most 8
# roundings in a step, the errors of v are carried on by the momentum.
SCALE, ROUNDINGS = 8.0, 8


@pytest.mark.parametrize("options", GRID, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counted", [True, False], ids=["with steps", "history"])
def test_six_steps_equal_those_of_torch(
    backend: str, counted: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    params = tensors(dtype, SHAPES)
    truth = Oracle(torch.optim.SGD, params, lr=0.1, **options)
    same = Oracle(torch.optim.SGD, params, dtype, lr=0.1, **options)
    buffers, steps = zeros_like(params), counters(params)
    for count in range(1, 7):
        grads, backup = like(params), clones(params)
        kept = clones(backup)
        truth.step(grads)
        same.step(grads)
        if counted or count > 1:
            history = steps if counted else None
            params = garbage(params)
            restore_sgd_(params, backup, grads, buffers, steps=history, lr=0.1, **options)
        else:  # torch takes the first step, and its buffers are history
            params = clones([p.detach() for p in same.params])
            if options["momentum"]:
                buffers = clones(same.state("momentum_buffer"))
        assert all_same_bits(backup, kept)
        for oracle, roundings in ((truth, ROUNDINGS), (same, 2 * ROUNDINGS)):
            assert_close(params, oracle.params, count * roundings, SCALE)
            if options["momentum"]:
                expected = oracle.state("momentum_buffer")
                assert_close(buffers, expected, count * roundings, SCALE)
    if counted:
        assert steps == counters(params, 6.0)
    if not options["momentum"]:
        assert all_same_bits(buffers, zeros_like(params))


@pytest.mark.parametrize("lr", [-2e-18, -0.25])
def test_a_negative_rate_goes_the_other_way(backend: str, lr: float) -> None:
    params, grads = tensors(torch.float32, SHAPES), tensors(torch.float32, SHAPES)
    descended = garbage(params)
    restore_sgd_(descended, params, grads, [], lr=lr)
    climbed = garbage(params)
    restore_sgd_(climbed, params, [-g for g in grads], [], lr=-lr)
    assert all_same_bits(descended, climbed)


@pytest.mark.parametrize("options", GRID[-8:], ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_result_is_rounded_once_to_its_dtype(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """One step at a time from the state as stored, so that roundings do not add up."""
    params = tensors(dtype, SHAPES)
    buffers = [torch.randn(p.shape).to(dtype) for p in params]
    for _ in range(3):
        grads = like(params)
        oracle = Oracle(torch.optim.SGD, params, lr=0.1, **options)
        if options["momentum"]:
            oracle.set_state(momentum_buffer=buffers)
        oracle.step(grads)
        backup, params = params, garbage(params)
        restore_sgd_(params, backup, grads, buffers, lr=0.1, **options)
        assert_close(params, oracle.params, ROUNDINGS, SCALE)
        if options["momentum"]:
            assert_close(buffers, oracle.state("momentum_buffer"), ROUNDINGS, SCALE)


@pytest.mark.parametrize("buffer_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_gradients_and_buffers_of_another_dtype(
    backend: str, grad_dtype: torch.dtype, buffer_dtype: torch.dtype
) -> None:
    params = tensors(FLOATS, SHAPES)
    grads, buffers = like(params, grad_dtype), like(params, buffer_dtype)
    oracle = Oracle(torch.optim.SGD, params, **FULL)
    oracle.set_state(momentum_buffer=buffers)
    oracle.step(grads)
    backup, params = params, garbage(params)
    restore_sgd_(params, backup, grads, buffers, **FULL)
    assert_close(params, oracle.params, ROUNDINGS, SCALE)
    for b, e, p in zip(buffers, oracle.state("momentum_buffer"), params, strict=True):
        coarse = b if b.dtype != torch.float64 or p.dtype == torch.float64 else b.float()
        assert_close([coarse], [e], ROUNDINGS, SCALE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    backup = tensors(torch.float32, [(4, 3, 5, 6), (6, 9)])
    grads, buffers = like(backup), like(backup)
    params, velocity = garbage(backup), clones(buffers)
    restore_sgd_(params, backup, grads, velocity, **FULL)
    for which in range(4):
        lists = [garbage(backup), clones(backup), clones(grads), clones(buffers)]
        lists[which] = [laid_out(t, layout) for t in lists[which]]
        restore_sgd_(*lists, **FULL)
        assert all_same_bits(lists[0], params)
        assert all_same_bits(lists[3], velocity)


def test_the_first_step_takes_the_gradient_as_momentum_without_dampening(backend: str) -> None:
    w, g = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    for steps, expected in (
        (counters([w]), g),
        (counters([w], 1.0), 0.5 * g),
        (None, 0.5 * g),
    ):
        buffers = [torch.zeros(3)]
        restore_sgd_([w.clone()], [w], [g], buffers, steps=steps, lr=0.1, momentum=0.5,
                     dampening=0.5)  # fmt: skip
        assert torch.equal(buffers[0], expected)


def test_a_first_step_does_not_read_the_buffers(backend: str) -> None:
    w, g, buffers = torch.ones(3), torch.ones(3), [torch.full((3,), NAN)]
    restore_sgd_([w], [w.clone()], [g], buffers, steps=counters([w]), lr=0.5, momentum=0.9)
    assert torch.equal(w, torch.full((3,), 0.5))
    assert torch.equal(buffers[0], g)


def test_steps_are_counted_without_momentum_and_may_differ(backend: str) -> None:
    params = tensors(torch.float32, [(3,), (2, 2)])
    steps = [torch.tensor([0.0]), torch.tensor(7.0)]
    restore_sgd_(params, clones(params), like(params), [], steps=steps, lr=0.1)
    assert [float(s) for s in steps] == [1.0, 8.0]
    buffers = [torch.zeros(3), torch.zeros(2, 2)]
    steps = [torch.tensor([0.0]), torch.tensor([[7.0]])]
    grads = [torch.ones(3), torch.ones(2, 2)]
    restore_sgd_(params, clones(params), grads, buffers, steps=steps, lr=0.1, momentum=0.9,
                 dampening=0.75)  # fmt: skip
    assert (buffers[0] == 1).all()
    assert (buffers[1] == 0.25).all()


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 2.0**16])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_divided_by_a_power_of_two_exactly(
    backend: str, maximize: bool, scale: float
) -> None:
    backup = tensors(FLOATS, SHAPES)
    grads, buffers = like(backup, torch.float32), like(backup)
    plain, scaled = garbage(backup), garbage(backup)
    others = clones(buffers)
    options = {**FULL, "maximize": maximize}
    restore_sgd_(plain, backup, grads, buffers, **options)
    restore_sgd_(
        *(scaled, backup, [g * scale for g in grads], others),
        **options,
        grad_scale=torch.tensor(scale),
        found_inf=one(0.0),
    )
    assert all_same_bits(scaled, plain)
    assert all_same_bits(others, buffers)


@pytest.mark.parametrize("bad", [INF, NAN, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("found_inf", [1.0, -1.0])
def test_on_overflow_weights_are_restored_and_nothing_else_changes(
    backend: str, found_inf: float, momentum: float, bad: float
) -> None:
    backup = [any_bits(shape, dtype) for shape in SHAPES for dtype in FLOATS]
    buffers = [any_bits(tuple(b.shape), b.dtype) for b in backup]
    steps = counters(backup, 3.0)
    kept, kept_buffers = clones(backup), clones(buffers)
    params = garbage(backup)
    grads = [torch.full(b.shape, bad) for b in backup]
    restore_sgd_(
        *(params, backup, grads, buffers),
        **FULL | {"momentum": momentum},
        steps=steps,
        grad_scale=one(2.0),
        found_inf=one(found_inf),
    )
    assert all_same_bits(params, kept)
    assert all_same_bits(backup, kept)
    assert all_same_bits(buffers, kept_buffers)
    assert all(step == 3 for step in steps)


def test_a_skipped_first_step_stays_a_first_step(backend: str) -> None:
    w, g = torch.ones(3), torch.ones(3)
    buffers, steps = [torch.full((3,), NAN)], counters([w])
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.9}
    restore_sgd_([w], [w.clone()], [g * INF], buffers, steps=steps, found_inf=one(1.0), **options)
    assert torch.equal(w, torch.ones(3))
    assert steps[0] == 0
    restore_sgd_([w], [w.clone()], [g], buffers, steps=steps, found_inf=one(0.0), **options)
    assert torch.equal(buffers[0], g)
    assert torch.equal(w, torch.full((3,), 0.5))
    assert steps[0] == 1


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_backup_may_be_the_parameters_themselves(
    backend: str, dtype: torch.dtype, found_inf: float | None
) -> None:
    backup = tensors(dtype, SHAPES)
    grads, buffers = like(backup), like(backup)
    apart, itself = garbage(backup), clones(backup)
    velocity, flag = clones(buffers), None if found_inf is None else one(found_inf)
    restore_sgd_(apart, backup, grads, buffers, **FULL, found_inf=flag)
    restore_sgd_(itself, itself, grads, velocity, **FULL, found_inf=flag)
    assert all_same_bits(itself, apart)
    assert all_same_bits(velocity, buffers)


def test_empty_lists_and_gradients_that_are_not_written(backend: str) -> None:
    restore_sgd_([], [], [], [], steps=[], lr=0.1, momentum=0.9)
    params = tensors(torch.float32, SHAPES)
    grads = like(params)
    kept = clones(grads)
    restore_sgd_(params, clones(params), grads, like(params), **FULL, grad_scale=one(4.0))
    assert all_same_bits(grads, kept)


def test_lr_zero_gives_the_weights_of_the_backup(backend: str) -> None:
    backup, params = tensors(FLOATS, SHAPES), garbage(tensors(FLOATS, SHAPES))
    restore_sgd_(params, backup, like(backup), like(backup), **FULL | {"lr": 0.0})
    assert all_same_bits(params, backup)


W = torch.ones(3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "backup dtype": ({"backup": [W.half()]}, TypeError, r"backup\[0\] must be torch.float32"),
    "backup missing": (
        *({"backup": []}, ValueError),
        "backup must hold as many tensors as params, 1, got 0",
    ),
    "grads shape": (
        *({"grads": [W[:2]]}, ValueError),
        r"grads\[0\] must have shape \(3,\).*got \(2,\)",
    ),
    "grads int": ({"grads": [W.int()]}, TypeError, r"grads\[0\] must be float32.*torch.int32"),
    "buffers missing": (
        *({"momentum_buffers": []}, ValueError),
        "momentum_buffers must hold as many tensors as params, 1, got 0",
    ),
    "steps missing": (
        *({"steps": []}, ValueError),
        "steps must hold as many tensors as params, 1, got 0",
    ),
    "steps int": ({"steps": [one(0).int()]}, TypeError, r"steps\[0\] must be float32, got .*int32"),
    "steps long": (
        *({"steps": [W]}, ValueError),
        r"steps\[0\] must have one element.*got shape \(3,\)",
    ),
    "steps elsewhere": (
        *({"steps": [torch.zeros((), device="meta")]}, ValueError),
        rf"steps\[0\] must have one element on {W.device}",
    ),
    "lr inf": ({"lr": -INF}, ValueError, "lr must be finite, got -inf"),
    "lr NaN": ({"lr": NAN}, ValueError, "lr must be .*got nan"),
    "lr None": ({"lr": None}, TypeError, "lr must be a number, got None"),
    "lr float64": ({"lr": one(0.1).double()}, TypeError, "lr must be float32, got torch.float64"),
    "lr long": ({"lr": W}, ValueError, r"lr must have one element, got shape \(3,\)"),
    "momentum < 0": ({"momentum": -0.9}, ValueError, "momentum must be .*got -0.9"),
    "weight_decay < 0": ({"weight_decay": -1.0}, ValueError, "weight_decay must be .*got -1.0"),
    "dampening too large": ({"dampening": 10**400}, ValueError, "dampening must be .*got 1000"),
    "buffers overlap": (
        *({"momentum_buffers": [torch.zeros(1).expand(3)]}, ValueError),
        r"momentum_buffers\[0\] must not have elements that share memory, .* with strides \(0,\)",
    ),
    "dampening a word": ({"dampening": "x"}, TypeError, "dampening must be a number, got 'x'"),
    "nesterov with dampening": (
        *({"nesterov": True, "dampening": 0.5}, ValueError),
        r"nesterov needs momentum > 0 and dampening = 0, got momentum=0\.9 and dampening=0\.5",
    ),
    "nesterov alone": (
        *({"nesterov": True, "momentum": 0.0}, ValueError),
        "nesterov needs .*momentum=0.0",
    ),
    "grad_scale float64": (
        *({"grad_scale": one(1).double()}, TypeError),
        "grad_scale must be float32",
    ),
    "grad_scale long": ({"grad_scale": W}, ValueError, r"grad_scale must have one element.*\(3,\)"),
    "found_inf float": ({"found_inf": 1.0}, TypeError, "found_inf must be a tensor, got float"),
    "grad_scale empty": (
        *({"grad_scale": W[:0]}, ValueError),
        r"grad_scale must have one element.*\(0,\)",
    ),
    "found_inf bool": ({"found_inf": one(1).bool()}, TypeError, "found_inf must be float32"),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_serve_raises_and_leaves_everything_as_it_was(
    backend: str, call: tuple[dict[str, Any], type[Exception], str]
) -> None:
    change, error, message = call
    w, v = torch.full((3,), 2.0), torch.full((3,), 5.0)
    args = {"params": [w], "backup": [W], "grads": [W], "momentum_buffers": [v]}
    options = {"lr": 0.1, "momentum": 0.9}
    with pytest.raises(error, match=message):
        restore_sgd_(**args | options | change)
    assert (w == 2).all()
    assert (v == 5).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_scalars_of_one_element_may_have_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    backup = tensors(torch.float32, SHAPES)
    grads, buffers = like(backup), like(backup)
    plain, velocity = garbage(backup), clones(buffers)
    restore_sgd_(plain, backup, grads, velocity, **FULL)
    params, steps = garbage(backup), [torch.ones(shape) for _ in backup]
    amp = {"grad_scale": torch.ones(shape), "found_inf": torch.zeros(shape)}
    restore_sgd_(params, backup, grads, buffers, steps=steps, **FULL, **amp)
    assert all_same_bits(params, plain)
    assert all_same_bits(buffers, velocity)
    assert all(step.shape == shape and step == 2 for step in steps)
