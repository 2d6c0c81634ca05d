"""Contract of ``grad_norm``: one global norm, right over float32's range, always the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ksam_kernels import grad_norm, perturb_, use_backend
from ksam_kernels.perturb import reference
from tests.conftest import INSTALLED
from tests.helpers import FLOATS, U32, any_bits, assert_within, bits, same_bits, smallest, threads
from tests.perturb.lists import LAYOUTS, SHAPES, laid_out, mixed, norm64, tensors

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=[*INSTALLED, "reference-float32 mode"])
def norm_of(request: pytest.FixtureRequest) -> Iterator[object]:
    """``grad_norm`` on every backend, and the reference's arithmetic without float64."""
    if request.param in INSTALLED:
        with use_backend(request.param):
            yield grad_norm
    else:
        yield lambda g, p=None, eta=0.0: reference.global_norm(g, p or [], eta, torch.float32)


def check(norm_of: object, grads: list[Tensor], params: list[Tensor] | None = None) -> None:
    """Summed in float64 only the result's rounding is left. In float32, each element is divided,
    squared and added along a path of pairwise or lane sums: 16 u bounds their square root's error.
    The smallest denormal is the error of a result below the normal numbers."""
    eta = 0.01 if params is not None else 0.0
    norm = norm_of(grads, params, eta)  # type: ignore[operator]
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    expected = norm64(grads, params, eta).float().double()  # above the range: inf
    assert_within(norm, expected, 16 * U32 * expected.abs() + smallest(torch.float32))


def test_equals_the_norm_of_all_elements_together(norm_of: object) -> None:
    grads = mixed(SHAPES)
    check(norm_of, grads)
    check(norm_of, grads, tensors(torch.float32, SHAPES))
    for dtype in FLOATS:
        check(norm_of, tensors(dtype, SHAPES))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(norm_of: object, layout: str) -> None:
    grads = [laid_out(g, layout) for g in mixed()]
    check(norm_of, grads)
    check(norm_of, grads, [laid_out(g, "transposed") for g in mixed()])


@pytest.mark.parametrize("exponent", [*range(-38, 35, 6), 34])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_nothing_inside_overflows_or_underflows(norm_of: object, size: int, exponent: int) -> None:
    values = (torch.rand(size, dtype=torch.float64) + 0.5) * 10.0**exponent
    check(norm_of, [values.float()])
    check(norm_of, [values[: size // 2].float(), values[size // 2 :].float()])
    if exponent > -38:  # an average T of 0.8 would leave the normal numbers
        check(norm_of, [values.float()], [torch.randn(size)])


def test_values_of_all_magnitudes_together(norm_of: object) -> None:
    check(norm_of, [10.0 ** torch.arange(-38, 35).float()])
    check(norm_of, [torch.full((100,), 1e-30), torch.full((3,), 1e30)])
    # 10^6 small ones that matter beside a large one
    check(norm_of, [torch.full((1_000_000,), 1e-3), torch.ones(1)])


def test_denormals_are_not_flushed(norm_of: object) -> None:
    tiny = smallest(torch.float32)
    check(norm_of, [torch.full((100,), 3 * tiny)])
    check(norm_of, [torch.tensor([tiny])])
    norm = norm_of([torch.tensor([3 * tiny, 4 * tiny])])  # type: ignore[operator]
    assert norm == 5 * tiny


def test_zeros_empty_tensors_and_empty_lists_give_zero(norm_of: object) -> None:
    for grads in ([], [torch.zeros(0)], [torch.zeros(5), -torch.zeros(3, 2)], [torch.zeros(())]):
        norm = norm_of(grads)  # type: ignore[operator]
        assert norm.dtype == torch.float32
        assert norm.shape == ()
        assert norm == 0


def test_the_norm_of_an_empty_list_is_on_the_cpu(backend: str) -> None:
    """Whatever the default device is."""
    with torch.device("meta"):
        for norm in (grad_norm([]), grad_norm([], []), perturb_([], [], [], rho=0.5)):
            assert norm.device == torch.device("cpu")
            assert norm == 0


def test_infinity_gives_inf_and_nan_gives_nan(norm_of: object) -> None:
    for value in (INF, -INF, NAN):
        for dtype in FLOATS:
            grads = [torch.randn(5000), torch.randn(7).to(dtype)]
            grads[1][3] = value
            norm = norm_of(grads)  # type: ignore[operator]
            assert norm.isnan() if value != value else norm == INF
    both = norm_of([torch.tensor([INF, 1.0]), torch.tensor([NAN])])  # type: ignore[operator]
    assert both.isnan()


def test_a_norm_above_the_range_of_float32_is_inf(norm_of: object) -> None:
    assert norm_of([torch.full((4,), 3e38)]) == INF  # type: ignore[operator]


def test_float64_gradients_beyond_float32_give_inf_or_zero(backend: str) -> None:
    assert grad_norm([torch.tensor([1e200], dtype=torch.float64)]) == INF
    assert grad_norm([torch.tensor([1e39], dtype=torch.float64)]) == INF
    assert grad_norm([torch.tensor([1e-60], dtype=torch.float64)]) == 0
    assert grad_norm([torch.tensor([1e-200], dtype=torch.float64)]) == 0


def test_the_adaptive_norm_weights_each_element(norm_of: object) -> None:
    g, w = [torch.tensor([3.0, 4.0])], [torch.tensor([-1.0, 0.0])]
    assert_within(norm_of(g, w, 0.0), torch.tensor(3.0), 3 * 4 * U32)  # type: ignore[operator]
    expected = torch.tensor([6.0, 4.0], dtype=torch.float64).norm()
    assert_within(norm_of(g, w, 1.0), expected, 16 * U32 * expected)  # type: ignore[operator]
    assert grad_norm(g, w, 0.0) != grad_norm(g)


def test_no_parameters_and_an_empty_list_of_them_differ(backend: str) -> None:
    assert grad_norm([], []) == 0
    with pytest.raises(ValueError, match="params must hold as many tensors as grads, 1, got 0"):
        grad_norm([torch.ones(1)], [])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_for_any_number_of_threads_and_in_every_run(
    norm_of: object, dtype: torch.dtype
) -> None:
    sizes = [((1 << 20) + 3,), (65537,), (1000, 333), (5,)]
    grads, params = tensors(dtype, sizes), tensors(torch.float32, sizes)
    for args in ((grads,), (grads, params, 0.1)):
        seen = set()
        for count in (1, 2, 3, 4, 2, 1):
            with threads(count):
                seen.add(int(bits(norm_of(*args))))  # type: ignore[operator]
        assert len(seen) == 1


def test_gradients_and_parameters_are_not_written(backend: str) -> None:
    grads, params = [any_bits((64,), torch.float32)], [any_bits((64,), torch.bfloat16)]
    before = [bits(t) for t in grads + params]
    grad_norm(grads, params, 0.5)
    assert all(torch.equal(bits(t), b) for t, b in zip(grads + params, before, strict=True))
    wanted = torch.ones(3, requires_grad=True)
    assert same_bits(grad_norm([wanted]), grad_norm([wanted.detach()]))


def test_what_it_cannot_serve_raises_with_the_argument_and_the_value(backend: str) -> None:
    g = torch.ones(3)
    for args, error, message in (
        (([g, [1.0]],), TypeError, r"grads\[1\] must be a tensor, got list"),
        (([g.int()],), TypeError, r"grads\[0\] must be float32.*got torch.int32"),
        (([g.to_sparse()],), TypeError, r"grads\[0\] must be a dense .*got layout torch.sparse"),
        (
            ([g], [torch.ones(2)]),
            ValueError,
            rf"params\[0\] must have shape \(3,\) on {g.device}.*got \(2,\)",
        ),
        (([g], [g, g]), ValueError, "params must hold as many tensors as grads, 1, got 2"),
        (([g], [g], -1.0), ValueError, "eta must be finite and >= 0.0, got -1.0"),
        (([g], [g], INF), ValueError, "eta must be .*got inf"),
        (([g], [g], NAN), ValueError, "eta must be .*got nan"),
    ):
        with pytest.raises(error, match=message):
            grad_norm(*args)


def test_transforms_raise_where_a_tangent_would_be_zero_in_silence(backend: str) -> None:
    def norm(x: Tensor) -> Tensor:
        return grad_norm([x])

    x = torch.ones(2, 3)
    refused = "grad_norm is not differentiable"
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.jvp(norm, (x,), (x,))
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.grad(norm)(x)
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.vmap(norm)(x)
