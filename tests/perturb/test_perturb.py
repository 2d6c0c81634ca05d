"""Contract of ``perturb_`` and ``restore_``: how far weights move, and which bits never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ksam_kernels import grad_norm, perturb_, restore_, use_backend
from ksam_kernels.perturb import native, reference
from tests.helpers import (
    FLOATS,
    U32,
    all_same_bits,
    any_bits,
    arithmetic_unit,
    assert_within,
    same_bits,
    smallest,
    unit,
)
from tests.perturb.lists import (
    LAYOUTS,
    SHAPES,
    SMALL,
    clones,
    empty_like,
    laid_out,
    like,
    mixed,
    norm64,
    tensors,
)

INF, NAN = float("inf"), float("nan")


def check(
    params: list[Tensor],
    grads: list[Tensor],
    rho: float | Sequence[float],
    adaptive: bool = False,
    eta: float = 0.0,
) -> None:
    before, given = clones(params), clones(grads)
    backup = empty_like(params)
    norm = perturb_(params, grads, backup, rho=rho, adaptive=adaptive, eta=eta)
    assert all_same_bits(backup, before)
    assert all_same_bits(grads, given)
    assert same_bits(norm, grad_norm(grads, before if adaptive else None, eta))
    n = norm64(grads, before if adaptive else None, eta)
    radii = [rho] * len(params) if isinstance(rho, float) else list(rho)
    for p, w, g, r in zip(params, before, grads, radii, strict=True):
        t = w.double().abs() + eta if adaptive else torch.ones(())
        step = r * t * t * g.double() / n
        expected = w.double() + step
        # The norm and at most 8 roundings in the step, of which 16 u for a norm summed in float32;
        # one in the sum; one to the parameter's dtype. A gradient rounded to the arithmetic: 1.
        arithmetic = arithmetic_unit(p.dtype) * (8 * step.abs() + expected.abs())
        norm_error = 16 * U32 * step.abs()
        rounding = unit(p.dtype) * expected.abs() + smallest(p.dtype)
        assert_within(p, expected, arithmetic + norm_error + rounding)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [*FLOATS, FLOATS], ids=lambda d: str(d) if d != FLOATS else "mix")
def test_weights_climb_by_rho_along_the_gradient(backend: str, dtype: Any, adaptive: bool) -> None:
    for eta in (0.0, 0.01):
        params = tensors(dtype, SHAPES)
        # rho so large that steps show beside bfloat16's rounding of the weights
        check(params, like(params), 30.0, adaptive, eta)
        check(tensors(dtype), tensors(dtype), 0.05, adaptive, eta)


def test_float64_parameters_are_served_in_float64(backend: str) -> None:
    """The norm as well: with the norm in float32 the step would be off by up to 6e-8."""
    w, g = torch.zeros(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    perturb_([w], [g], [w.clone()], rho=1.0)
    assert_within(w, g / g.norm(), 8 * 2.0**-53)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_parameters_and_gradients(
    backend: str, layout: str, grad_layout: str, adaptive: bool
) -> None:
    params = [laid_out(p, layout) for p in mixed()]
    grads = [laid_out(g, grad_layout) for g in like(params)]
    check(params, grads, 2.0, adaptive, 0.1)


def test_writing_to_a_slice_leaves_its_neighbours(backend: str) -> None:
    base = any_bits((6, 9), torch.float32)
    base[:, 1::2] = 1.0
    before = base.clone()
    view = base[:, 1::2]
    backup = [torch.empty_like(view)]
    perturb_([view], [torch.ones(6, 4)], backup, rho=1.0)
    assert (view != 1).all()
    assert same_bits(base[:, ::2], before[:, ::2])
    restore_([view], backup)
    assert same_bits(base, before)


@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_another_dtype(
    backend: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    params = tensors(dtype)
    check(params, like(params, grad_dtype), 2.0)
    check(params, like(params, grad_dtype), 2.0, True, 0.1)


def test_a_radius_per_tensor_with_one_global_norm(backend: str) -> None:
    params = mixed()
    check(params, like(params), [0.5 * i for i in range(len(params))])
    check(params, like(params), [0.5 * i for i in range(len(params))], True, 0.1)
    one, two = mixed(), []
    two = clones(one)
    grads = like(one)
    perturb_(one, grads, empty_like(one), rho=0.3)
    perturb_(two, grads, empty_like(two), rho=[0.3] * len(two))
    assert all_same_bits(one, two)


@pytest.mark.parametrize("rho", [0.05, 1.0, 10.0, -0.5])
def test_the_whole_step_has_length_rho(backend: str, rho: float) -> None:
    params = [torch.zeros(shape) for shape in SHAPES]
    perturb_(params, like(params), empty_like(params), rho=rho)
    assert_within(norm64(params), torch.tensor(abs(rho)), 32 * U32 * abs(rho))


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_a_negative_radius_goes_down(backend: str, adaptive: bool) -> None:
    params = [torch.randn(shape, dtype=dtype) for dtype in FLOATS for shape in SMALL]
    down, grads = clones(params), like(params)
    options = {"adaptive": adaptive, "eta": 0.25}
    norm = perturb_(down, grads, empty_like(down), rho=-0.3, **options)
    up = [-g for g in grads]
    assert torch.equal(norm, perturb_(params, up, empty_like(params), rho=0.3, **options))
    assert all_same_bits(down, params)


def bit_patterns(shapes: Sequence[tuple[int, ...]] = SMALL) -> list[Tensor]:
    """Parameters of every dtype with NaN payloads, infinities, denormals and -0."""
    return [any_bits(shape, dtype) for dtype in FLOATS for shape in shapes]


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_radius_zero_keeps_the_bits(backend: str, adaptive: bool) -> None:
    params = [*bit_patterns(), torch.ones(3)]
    before = clones(params)
    radii = [0.0] * (len(params) - 1) + [1.0]
    grads = [torch.randn(p.shape) for p in params]
    if adaptive:  # T g of any bits would be NaN
        params = [torch.full_like(p, -0.0) for p in params[:-1]] + [torch.ones(3)]
        before = clones(params)
    backup = empty_like(params)
    perturb_(params, grads, backup, rho=radii, adaptive=adaptive)
    assert all_same_bits(params[:-1], before[:-1])
    assert (params[-1] != 1).any()
    assert all_same_bits(backup, before)
    perturb_(params, grads, backup, rho=0.0, adaptive=adaptive)
    assert all_same_bits(params[:-1], before[:-1])


@pytest.mark.parametrize("value", [0.0, -0.0, INF, -INF, NAN, "above the range"], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_a_norm_of_zero_inf_or_nan_keeps_the_bits_and_shows(
    backend: str, adaptive: bool, value: Any
) -> None:
    params = bit_patterns()
    if adaptive and value == 0:  # inf * 0 is NaN, which is another of these cases
        params = [p.nan_to_num(-0.0, -0.0, -0.0) for p in params]
    before = clones(params)
    if value in (0.0, -0.0):
        grads = [torch.full(p.shape, value) for p in params]
    else:
        grads = [torch.randn(p.shape) for p in params]
        grads[-1][-3:] = 3e38 if isinstance(value, str) else value
    backup = empty_like(params)
    norm = perturb_(params, grads, backup, rho=0.5, adaptive=adaptive, eta=1.0)
    assert all_same_bits(params, before)
    assert all_same_bits(backup, before)
    if value == 0:
        assert norm == 0
    elif adaptive or value != value:
        assert not norm.isfinite()
    else:
        assert norm == INF


def test_a_nan_weight_stays_nan_and_the_others_move_as_without_it(backend: str) -> None:
    w = torch.randn(50)
    broken = w.clone()
    broken[7] = NAN
    g = torch.randn(50)
    perturb_([w], [g], [w.clone()], rho=0.5)
    perturb_([broken], [g], [broken.clone()], rho=0.5)
    others = torch.arange(50) != 7
    assert broken[7].isnan()
    assert same_bits(broken[others], w[others])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-40, 1e-39, 3e-38])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_at_a_denormal_norm_weights_stay_finite_and_move_by_at_most_rho(
    backend: str, adaptive: bool, scale: float, grad_dtype: torch.dtype
) -> None:
    for dtype in FLOATS:
        w = torch.zeros(37, dtype=dtype)
        g = (torch.randn(37, dtype=torch.float64) * scale).to(grad_dtype)
        norm = perturb_([w], [g], [w.clone()], rho=0.5, adaptive=adaptive, eta=1.0)
        assert norm < 1e-36
        assert w.isfinite().all()
        assert norm64([w]) <= 0.5 * (1 + 2 * unit(dtype) + 32 * U32)


def test_just_above_the_denormals_the_step_is_whole(backend: str) -> None:
    w, g = torch.zeros(100), torch.full((100,), 1e-38)
    perturb_([w], [g], [w.clone()], rho=0.5)
    assert_within(w, torch.full((100,), 0.05), 32 * U32 * 0.05)


def test_the_largest_gradients_give_a_whole_step(backend: str) -> None:
    w, g = torch.zeros(100), torch.full((100,), 1e34)
    perturb_([w], [g], [w.clone()], rho=0.5)
    assert_within(w, torch.full((100,), 0.05), 32 * U32 * 0.05)


def test_empty_lists_and_empty_tensors_give_norm_zero(backend: str) -> None:
    for params in ([], [torch.zeros(0)], [torch.zeros(0), torch.zeros(3, 0)]):
        norm = perturb_(params, clones(params), clones(params), rho=0.5)
        assert norm.dtype == torch.float32
        assert norm.shape == ()
        assert norm == 0
        restore_(params, clones(params))


def test_parameters_that_require_grad_are_written_without_a_graph(backend: str) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    norm = perturb_([w], [torch.ones(3)], [torch.empty(3)], rho=0.5)
    assert w.is_leaf
    assert w.requires_grad
    assert w.grad_fn is None
    assert not norm.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_restore_gives_the_bytes_of_the_backup(backend: str, layout: str) -> None:
    backup = [laid_out(b, "contiguous") for b in bit_patterns(SHAPES)]
    params = [laid_out(torch.randn(b.shape).to(b.dtype), layout) for b in backup]
    kept = clones(backup)
    restore_(params, backup)
    assert all_same_bits(params, kept)
    assert all_same_bits(backup, kept)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_restore_undoes_perturb_bit_for_bit(backend: str, adaptive: bool) -> None:
    params = mixed(SHAPES)
    before, backup = clones(params), empty_like(params)
    perturb_(params, like(params), backup, rho=5.0, adaptive=adaptive)
    assert not all_same_bits(params, before)
    restore_(params, backup)
    assert all_same_bits(params, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_weights_as_they_were(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    params = mixed()
    before, backup, moved = clones(params), empty_like(params), []
    whole, calls = reference.opmath_dtype, iter(range(100))

    def fail_half_way(dtype: torch.dtype) -> torch.dtype:
        if next(calls) == len(params) - 1:
            moved.append(not all_same_bits(params, before))
            raise error("half-way")
        return whole(dtype)

    monkeypatch.setattr(reference, "opmath_dtype", fail_half_way)
    with use_backend("reference"), pytest.raises(error, match="half-way"):
        perturb_(params, like(params), backup, rho=1.0)
    assert moved == [True]
    assert all_same_bits(params, before)


W = torch.ones(3)


def refused() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    meta, short = W.to("meta"), torch.ones(2)
    return {
        "params int": ({"params": [W.int()]}, TypeError, r"params\[0\] must be float32.*int32"),
        "grads sparse": ({"grads": [W.to_sparse()]}, TypeError, r"grads\[0\] must be a dense"),
        "grads short": (
            *({"grads": [short]}, ValueError),
            r"grads\[0\] must have shape \(3,\).*got \(2,\)",
        ),
        "grads of more dimensions": (
            *({"grads": [torch.ones(3, 1)]}, ValueError),
            r"grads\[0\] must have shape \(3,\).*got \(3, 1\)",
        ),
        "grads missing": (
            *({"grads": []}, ValueError),
            "grads must hold as many tensors as params, 1, got 0",
        ),
        "grads None": ({"grads": [None]}, TypeError, r"grads\[0\] must be a tensor, got NoneType"),
        "grads elsewhere": ({"grads": [meta]}, ValueError, r"grads\[0\] must have .*on meta"),
        "backup dtype": (
            *({"backup": [W.double()]}, TypeError),
            r"backup\[0\] must be torch.float32 like params\[0\], got torch.float64",
        ),
        "backup short": ({"backup": [short]}, ValueError, r"backup\[0\] must have shape \(3,\)"),
        "backup missing": (
            *({"backup": []}, ValueError),
            "backup must hold as many tensors as params, 1, got 0",
        ),
        "backup overlaps": (
            *({"backup": [torch.zeros(1).expand(3)]}, ValueError),
            r"backup\[0\] must not have elements that share memory, .* with strides \(0,\)",
        ),
        "params overlap": (
            *({"params": [torch.ones(1).expand(3)]}, ValueError),
            r"params\[0\] must not have elements that share memory, .* with strides \(0,\)",
        ),
        "params on two": (
            *({"params": [W, meta], "grads": [W, meta], "backup": [W.clone(), meta]}, ValueError),
            r"params\[1\] must be on .* like params\[0\], got meta",
        ),
        "rho inf": ({"rho": INF}, ValueError, "rho must be finite, got inf"),
        "rho NaN": ({"rho": [NAN]}, ValueError, "rho must be .*got nan"),
        "rho too large": ({"rho": [10**400]}, ValueError, "rho must be finite, got 1000"),
        "one rho too large": ({"rho": 10**400}, ValueError, "rho must be finite, got 1000"),
        "rho a tensor": (
            *({"rho": torch.tensor(0.5)}, TypeError),
            r"rho must be a number or a sequence of numbers, got tensor\(0.5",
        ),
        "rho None": ({"rho": [None]}, TypeError, "rho must be a number, got None"),
        "rho too many": (
            *({"rho": [1.0, 2.0]}, ValueError),
            "rho must be one radius, .* 1 params, got 2",
        ),
        "eta None": ({"eta": None}, TypeError, "eta must be a number, got None"),
        "eta < 0": ({"eta": -1.0}, ValueError, "eta must be finite and >= 0.0, got -1.0"),
    }


@pytest.mark.parametrize("call", refused().values(), ids=refused().keys())
def test_what_it_cannot_serve_raises_and_leaves_everything_as_it_was(
    backend: str, call: tuple[dict[str, Any], type[Exception], str]
) -> None:
    change, error, message = call
    w, b = torch.ones(3), torch.full((3,), NAN)
    args = {"params": [w], "grads": [torch.ones(3)], "backup": [b], "rho": 0.5} | change
    with pytest.raises(error, match=message):
        perturb_(**args)
    assert torch.equal(w, torch.ones(3))
    assert b.isnan().all()


def test_gradients_may_share_memory_where_no_kernel_looks_at_them(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the gradient of a sum does."""
    found = []
    for looked in (True, False):
        if not looked:
            monkeypatch.setattr(native, "fits", lambda *_, **__: False)
            monkeypatch.setattr(native, "direct", lambda _: None)
            monkeypatch.setattr(native, "direct_in_place", lambda _: None)
        w, grads = [torch.ones(3, 4)], [torch.ones(()).expand(3, 4)]
        norm = perturb_(w, grads, [torch.empty(3, 4)], rho=0.5)
        found.append([*w, norm, grad_norm(grads)])
    assert all_same_bits(*found)


def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    moved = []
    for rho in (0.5, np.float32(0.5), [np.float64(0.5)], 1):
        w = [torch.ones(3)]
        perturb_(w, [torch.ones(3)], [torch.empty(3)], rho=rho)
        moved.append(w[0])
    assert torch.equal(moved[1], moved[0])
    assert torch.equal(moved[2], moved[0])
    assert not torch.equal(moved[3], moved[0])


def test_restore_refuses_a_backup_that_does_not_fit(backend: str) -> None:
    for backup, error, message in (
        ([], ValueError, "backup must hold as many tensors as params, 1, got 0"),
        ([torch.ones(2)], ValueError, r"backup\[0\] must have shape \(3,\)"),
        ([W.half()], TypeError, r"backup\[0\] must be torch.float32 .*got torch.float16"),
    ):
        with pytest.raises(error, match=message):
            restore_([torch.ones(3)], backup)
