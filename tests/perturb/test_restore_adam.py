"""Contract of ``restore_adam_``: torch.optim.Adam's and AdamW's update of the backup."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ksam_kernels import restore_adam_
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
    {"betas": betas, "weight_decay": weight_decay, "maximize": maximize, "eps": eps}
    for betas, weight_decay, maximize, eps in itertools.product(
        ((0.9, 0.999), (0.3, 0.5), (0.0, 0.9)), (0.0, 0.1), (False, True), (1e-8, 1e-2)
    )
]
KINDS = {False: torch.optim.Adam, True: torch.optim.AdamW}
FULL = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.1}
# m and v stay below 32 (squares of normal values), with up to 12 roundings in a step.
SCALE, ROUNDINGS, LR = 32.0, 12, 0.05
# lr m / sqrt(v): m and v may be exact to 12 u of the gradients that made them only, and the
# quotient then is off by 12 u |g| / sqrt(v), where sqrt(v) >= |g| sqrt(1 - beta2) / root.
WEIGHT_SCALE = 8.0


def step(
    params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]], **options: Any
) -> list[Tensor]:
    """The updated parameters; checks that what is not written keeps its bits."""
    backup, new = clones(params), garbage(params)
    kept = clones(grads)
    restore_adam_(new, backup, grads, *state, **options)
    assert all_same_bits(backup, params)
    assert all_same_bits(grads, kept)
    return new


@pytest.mark.parametrize("options", GRID, ids=name)
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_six_steps_equal_those_of_torch(
    backend: str, dtype: torch.dtype, decoupled: bool, options: dict[str, Any]
) -> None:
    params = tensors(dtype, SHAPES)
    truth = Oracle(KINDS[decoupled], params, lr=LR, **options)
    same = Oracle(KINDS[decoupled], params, dtype, lr=LR, **options)
    state = [zeros_like(params), zeros_like(params), counters(params)]
    for count in range(1, 7):
        grads = like(params)
        truth.step(grads)
        same.step(grads)
        params = step(params, grads, state, lr=LR, decoupled_weight_decay=decoupled, **options)
        for oracle, roundings in ((truth, ROUNDINGS), (same, 2 * ROUNDINGS)):
            assert_close(params, oracle.params, count * roundings, WEIGHT_SCALE)
            assert_close(state[0], oracle.state("exp_avg"), count * roundings, SCALE)
            assert_close(state[1], oracle.state("exp_avg_sq"), count * roundings, SCALE)
        assert [float(s) for s in state[2]] == [float(s) for s in same.state("step")]
    assert state[2] == counters(params, 6.0)


def random_state(params: list[Tensor], steps: float, dtype: torch.dtype | None = None) -> Any:
    second = [g.square() for g in like(params, dtype)]
    return [like(params, dtype), second, counters(params, steps)]


@pytest.mark.parametrize("steps", [0.0, 1.0, 10.0, 999.0, 1e6])
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_result_is_rounded_once_to_its_dtype(
    backend: str, dtype: torch.dtype, decoupled: bool, steps: float
) -> None:
    """One step from the state as stored, so that roundings do not add up."""
    for options in GRID[::3]:
        params = tensors(dtype, SHAPES)
        state = random_state(params, steps)
        # v of a chance zero would make any rounding of m matter
        state[1] = [(v + 0.25).to(dtype) for v in state[1]]
        grads = like(params)
        oracle = Oracle(KINDS[decoupled], params, lr=LR, **options)
        oracle.set_state(exp_avg=state[0], exp_avg_sq=state[1], step=state[2])
        oracle.step(grads)
        new = step(params, grads, state, lr=LR, decoupled_weight_decay=decoupled, **options)
        assert_close(new, oracle.params, 2 * ROUNDINGS, WEIGHT_SCALE)
        assert_close(state[0], oracle.state("exp_avg"), ROUNDINGS, SCALE)
        assert_close(state[1], oracle.state("exp_avg_sq"), ROUNDINGS, SCALE)


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("state_dtype", FLOATS, ids=str)
def test_gradients_and_state_of_another_dtype(
    backend: str, state_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    params = tensors(FLOATS, SHAPES)
    state = random_state(params, 4.0, state_dtype)
    state[1] = [v + 0.25 for v in state[1]]
    grads = like(params, grad_dtype)
    oracle = Oracle(torch.optim.AdamW, params, **FULL)
    oracle.set_state(exp_avg=state[0], exp_avg_sq=state[1], step=state[2])
    oracle.step(grads)
    new = step(params, grads, state, decoupled_weight_decay=True, **FULL)
    assert_close(new, oracle.params, 2 * ROUNDINGS, WEIGHT_SCALE)
    for place, key in enumerate(("exp_avg", "exp_avg_sq")):
        for a, e, p in zip(state[place], oracle.state(key), params, strict=True):
            # float64 state of a float32 parameter has float32 digits
            coarse = a if a.dtype != torch.float64 or p.dtype == torch.float64 else a.float()
            assert_close([coarse], [e], ROUNDINGS, SCALE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    backup = tensors(torch.float32, [(4, 3, 5, 6), (6, 9)])
    grads, (m, v, steps) = like(backup), random_state(backup, 2.0)
    lists = [garbage(backup), clones(backup), clones(grads), clones(m), clones(v)]
    restore_adam_(*lists, clones(steps), **FULL)
    expected = lists
    for which in range(5):
        lists = [garbage(backup), clones(backup), clones(grads), clones(m), clones(v)]
        lists[which] = [laid_out(t, layout) for t in lists[which]]
        restore_adam_(*lists, clones(steps), **FULL)
        assert all(map(all_same_bits, lists, expected))


def test_each_parameter_has_a_step_count_of_its_own(backend: str) -> None:
    w, g = torch.zeros(2), torch.ones(2)
    steps = [torch.tensor([0.0]), torch.tensor([[3.0]])]
    params, state = [w.clone(), w.clone()], [zeros_like([w, w]), zeros_like([w, w])]
    restore_adam_(params, clones(params), [g, g], *state, steps, lr=1.0, betas=(0.5, 0.5))
    assert [float(s) for s in steps] == [1.0, 4.0]
    # m = v = 1/2; m / (1 - 2^-t) / sqrt(v / (1 - 2^-t)) = sqrt(1/2 / (1 - 2^-t))
    assert_close([params[0]], [torch.full((2,), -1.0)], 8, 1.0)
    assert_close([params[1]], [torch.full((2,), -((8 / 15) ** 0.5))], 8, 1.0)


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 2.0**16])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_divided_by_a_power_of_two_exactly(
    backend: str, maximize: bool, scale: float
) -> None:
    params = tensors(FLOATS, SHAPES)
    grads, state = like(params, torch.float32), random_state(params, 2.0)
    other = [clones(part) for part in state]
    options = {**FULL, "maximize": maximize}
    plain = step(params, grads, state, **options)
    amp = {"grad_scale": torch.tensor(scale), "found_inf": one(0.0)}
    scaled = step(params, [g * scale for g in grads], other, **options, **amp)
    assert all_same_bits(scaled, plain)
    assert all(map(all_same_bits, other, state))


@pytest.mark.parametrize("bad", [INF, NAN, 1.0])
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_on_overflow_weights_are_restored_and_nothing_else_changes(
    backend: str, decoupled: bool, bad: float
) -> None:
    backup = [any_bits(shape, dtype) for shape in SHAPES for dtype in FLOATS]
    state = [[any_bits(tuple(b.shape), b.dtype) for b in backup] for _ in range(2)]
    state.append(counters(backup, 3.0))
    kept, before = clones(backup), [clones(part) for part in state]
    params = garbage(backup)
    grads = [torch.full(b.shape, bad) for b in backup]
    restore_adam_(
        *(params, backup, grads, *state),
        **FULL,
        decoupled_weight_decay=decoupled,
        grad_scale=one(2.0),
        found_inf=one(1.0),
    )
    assert all_same_bits(params, kept)
    assert all_same_bits(backup, kept)
    assert all(map(all_same_bits, state, before))


def test_a_skipped_first_step_stays_a_first_step(backend: str) -> None:
    w = torch.randn(50)
    g = torch.randn(50)
    once, twice = ([zeros_like([w]), zeros_like([w]), counters([w])] for _ in range(2))
    expected = step([w], [g], once, **FULL)
    skipped = step([w], [g * INF], twice, **FULL, found_inf=one(1.0))
    assert all_same_bits(skipped, [w])
    assert all_same_bits(step(skipped, [g], twice, **FULL, found_inf=one(0.0)), expected)
    assert all(map(all_same_bits, twice, once))


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_the_backup_may_be_the_parameters_themselves(
    backend: str, decoupled: bool, found_inf: float | None
) -> None:
    params = tensors(FLOATS, SHAPES)
    grads, state = like(params), random_state(params, 2.0)
    other, itself = [clones(part) for part in state], clones(params)
    flag = None if found_inf is None else one(found_inf)
    options = FULL | {"decoupled_weight_decay": decoupled, "found_inf": flag}
    apart = step(params, grads, state, **options)
    restore_adam_(itself, itself, grads, *other, **options)
    assert all_same_bits(itself, apart)
    assert all(map(all_same_bits, other, state))


def test_adam_and_adamw_differ_and_empty_lists_are_fine(backend: str) -> None:
    params = tensors(torch.float32, SHAPES)
    grads, state = like(params), random_state(params, 2.0)
    other = [clones(part) for part in state]
    adam = step(params, grads, state, **FULL)
    adamw = step(params, grads, other, **FULL, decoupled_weight_decay=True)
    assert not all_same_bits(adam, adamw)
    assert not all_same_bits(state[0], other[0])
    restore_adam_([], [], [], [], [], [], lr=0.1)


def test_lists_may_be_any_that_give_tensors(backend: str) -> None:
    params = tensors(torch.float32, SHAPES)
    grads, state = like(params), random_state(params, 2.0)
    other, moved = [clones(part) for part in state], garbage(params)
    expected = step(params, grads, state, **FULL)
    restore_adam_(*map(iter, (moved, params, grads, *other)), **FULL)
    assert all_same_bits(moved, expected)
    assert all(map(all_same_bits, other, state))


@pytest.mark.parametrize("step", [-2.0, -1.0, float("nan")])
def test_a_step_count_without_meaning_gives_nan_as_in_torch(backend: str, step: float) -> None:
    w = [torch.ones(3)]
    restore_adam_(w, clones(w), clones(w), clones(w), clones(w), [torch.tensor(step)], lr=0.1)
    assert w[0].isnan().all()


W, ONE = torch.ones(3), one(0.0)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "backup dtype": ({"backup": [W.half()]}, TypeError, r"backup\[0\] must be torch.float32"),
    "grads shape": (
        *({"grads": [W[:2]]}, ValueError),
        r"grads\[0\] must have shape \(3,\).*got \(2,\)",
    ),
    "exp_avgs missing": (
        *({"exp_avgs": []}, ValueError),
        "exp_avgs must hold as many tensors as params, 1, got 0",
    ),
    "exp_avg_sqs shape": (
        *({"exp_avg_sqs": [W[:1]]}, ValueError),
        r"exp_avg_sqs\[0\] must have shape \(3,\)",
    ),
    "exp_avgs overlap": (
        *({"exp_avgs": [torch.zeros(1).expand(3)]}, ValueError),
        r"exp_avgs\[0\] must not have elements that share",
    ),
    "steps missing": (
        *({"steps": []}, ValueError),
        "steps must hold as many tensors as params, 1, got 0",
    ),
    "steps float64": ({"steps": [ONE.double()]}, TypeError, r"steps\[0\] must be float32"),
    "steps long": (
        *({"steps": [W]}, ValueError),
        r"steps\[0\] must have one element.*got shape \(3,\)",
    ),
    "eps < 0": ({"eps": -1e-8}, ValueError, "eps must be .*got -1e-08"),
    "eps inf": ({"eps": INF}, ValueError, "eps must be .*got inf"),
    "weight_decay < 0": ({"weight_decay": -1.0}, ValueError, "weight_decay must be .*got -1.0"),
    "beta1 = 1": ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    "beta2 < 0": ({"betas": (0.9, -0.5)}, ValueError, r"betas\[1\] must be .*got -0.5"),
    "a beta": ({"betas": 0.9}, ValueError, r"betas must be two numbers, got 0\.9"),
    "one beta": ({"betas": (0.9,)}, ValueError, r"betas must be two numbers, got \(0.9,\)"),
    "beta2 None": ({"betas": (0.9, None)}, TypeError, r"betas\[1\] must be a number, got None"),
    "lr inf": ({"lr": INF}, ValueError, "lr must be finite, got inf"),
    "lr float64": ({"lr": ONE.double()}, TypeError, "lr must be float32, got torch.float64"),
    "beta2 NaN": ({"betas": (0.9, NAN)}, ValueError, r"betas\[1\] must be .*got nan"),
    "grad_scale long": ({"grad_scale": W}, ValueError, r"grad_scale must have one element.*\(3,\)"),
    "found_inf empty": (
        *({"found_inf": W[:0]}, ValueError),
        r"found_inf must have one element.*\(0,\)",
    ),
    "found_inf float": ({"found_inf": 1.0}, TypeError, "found_inf must be a tensor, got float"),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_serve_raises_and_leaves_everything_as_it_was(
    backend: str, call: tuple[dict[str, Any], type[Exception], str]
) -> None:
    change, error, message = call
    w, m, v, t = (torch.full((n,), 5.0) for n in (3, 3, 3, 1))
    lists = {"params": [w], "backup": [W], "grads": [W], "exp_avgs": [m], "exp_avg_sqs": [v]}
    with pytest.raises(error, match=message):
        restore_adam_(**lists | {"steps": [t], "lr": 0.1} | change)
    assert all((x == 5).all() for x in (w, m, v, t))


def test_a_mean_half_way_is_torchs_bit_for_bit(backend: str) -> None:
    """torch.lerp changes its formula there."""
    params = tensors(torch.float32, SHAPES)
    grads, state = like(params), [like(params), zeros_like(params), counters(params, 3.0)]
    expected = [torch.lerp(m, g, 0.5) for m, g in zip(state[0], grads, strict=True)]
    restore_adam_(params, clones(params), grads, *state, lr=0.1, betas=(0.5, 0.999))
    assert all_same_bits(state[0], expected)


def test_defaults_are_those_of_torch(backend: str) -> None:
    params = tensors(torch.float64, SHAPES)
    oracle, grads = Oracle(torch.optim.Adam, params), like(params)
    oracle.step(grads)
    moved, state = garbage(params), [zeros_like(params), zeros_like(params), counters(params)]
    restore_adam_(moved, params, grads, *state, lr=1e-3)
    assert_close(moved, oracle.params, 12, 8.0)


def test_a_decay_near_1_is_rounded_as_torch_rounds_it(backend: str) -> None:
    w = tensors(torch.float32, SHAPES)
    grads = zeros_like(w)
    oracle = Oracle(torch.optim.AdamW, w, torch.float32, lr=0.1, weight_decay=9.0)
    oracle.step(grads)
    moved, state = garbage(w), [zeros_like(w), zeros_like(w), counters(w)]
    restore_adam_(*(moved, w, grads), *state, lr=0.1, weight_decay=9.0, decoupled_weight_decay=True)
    assert all_same_bits(moved, oracle.params)
