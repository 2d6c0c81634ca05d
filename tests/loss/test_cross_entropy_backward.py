"""Contract of ``cross_entropy``'s gradient, against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ksam_kernels import cross_entropy
from ksam_kernels.native import extension
from tests.helpers import FLOATS, assert_within, bits, same_bits, sliced, transposed
from tests.loss.oracle import KINDS, Case, expected_gradient, gradient_tolerance, make_case

INF, NAN = float("inf"), float("nan")


def gradient_of(case: Case, upstream: Tensor) -> Tensor:
    x = case.logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(x, case.target, **case.options), x, upstream)
    return gradient


def check(case: Case, upstream: Tensor) -> Tensor:
    before = bits(case.logits)
    gradient = gradient_of(case, upstream)
    assert gradient.dtype == case.logits.dtype
    expected = expected_gradient(case, upstream)
    assert_within(gradient, expected, gradient_tolerance(case, upstream, expected))
    assert torch.equal(bits(case.logits), before)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 7, 8, 17, 33, 1000, 4097])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_float64_autograd_for_any_upstream_gradient(
    backend: str, dtype: torch.dtype, classes: int, kind: str
) -> None:
    upstream = torch.randn(9)
    upstream[3] = 0
    check(make_case(kind, (3 * torch.randn(9, classes)).to(dtype)), upstream)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (2, 0)], ids=str)
def test_any_leading_shape(backend: str, rows: tuple[int, ...]) -> None:
    for kind in KINDS:
        check(make_case(kind, torch.randn(*rows, 17)), torch.randn(rows))


@pytest.mark.parametrize("layout", [sliced, transposed], ids=["sliced", "transposed"])
def test_strided_logits(backend: str, layout: object) -> None:
    for kind in KINDS:
        case = make_case(kind, layout(torch.randn(2, 5, 19)))  # type: ignore[operator]
        check(case, torch.randn(5, 2).t())


@pytest.mark.parametrize("reduce", [Tensor.mean, Tensor.sum], ids=["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_upstream_gradient_of_stride_0(backend: str, kind: str, reduce: object) -> None:
    case = make_case(kind, torch.randn(8, 17))
    x = case.logits.clone().requires_grad_()
    reduce(cross_entropy(x, case.target, **case.options)).backward()  # type: ignore[operator]
    share = 1 / 8 if reduce is Tensor.mean else 1.0
    assert x.grad is not None
    assert same_bits(x.grad, gradient_of(case, torch.full((8,), share)))


def test_int32_targets_give_the_bits_of_int64_targets(backend: str) -> None:
    case = make_case("weighted smoothed", torch.randn(20, 11))
    narrow = Case(case.logits, case.target.int(), case.weight, -100, case.label_smoothing)
    upstream = torch.randn(20)
    assert same_bits(gradient_of(narrow, upstream), check(case, upstream))


def test_an_offset_common_to_the_logits_costs_no_digits(backend: str) -> None:
    check(make_case("hard", torch.randn(64, 100) + 1e4), torch.randn(64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("classes", [7, 15, 16, 40])
def test_ignored_rows_have_gradient_zero_even_with_nan(
    backend: str, classes: int, ignore_index: int, smoothing: float, dtype: torch.dtype
) -> None:
    logits, target = torch.randn(12, classes).to(dtype), torch.randint(4, 7, (12,))
    target[::3] = ignore_index
    logits[0], logits[3, 1], logits[6] = NAN, INF, -INF
    upstream = torch.randn(12)
    upstream[0] = INF
    for weight in (None, torch.rand(classes)):
        gradient = gradient_of(Case(logits, target, weight, ignore_index, smoothing), upstream)
        assert torch.equal(gradient[::3], torch.zeros(4, classes, dtype=dtype))
        assert (gradient[1::3] != 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logits_at_minus_infinity_have_gradient_zero(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 9).to(dtype)
    logits[:, 5:] = -INF
    gradient = check(Case(logits, torch.tensor([0, 1, 2, 3])), torch.randn(4))
    assert torch.equal(gradient[:, 5:], torch.zeros(4, 4, dtype=dtype))


@pytest.mark.parametrize("row", [[INF, 0.0, 1.0], [-INF] * 3, [0.0, NAN, 1.0]], ids=str)
def test_a_row_whose_loss_is_nan_has_a_nan_gradient_and_leaves_the_others(
    backend: str, row: list[float]
) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]])
    gradient = gradient_of(Case(logits, torch.tensor([0, 1])), torch.ones(2))
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("classes", [5, 20, 5000])
def test_an_infinite_weight_of_a_class_that_no_row_has_changes_nothing(
    backend: str, classes: int
) -> None:
    """As 1 / count is, of a class without samples."""
    x, target = torch.randn(4, classes), torch.tensor([0, 1, 2, 0])
    weight = torch.ones(classes)
    ones = Case(x, target, weight.clone())
    weight[3] = INF
    upstream = torch.ones(4)
    assert same_bits(gradient_of(Case(x, target, weight), upstream), gradient_of(ones, upstream))


def test_the_gradient_arrives_once_and_accumulates(backend: str) -> None:
    case = make_case("hard", torch.randn(4, 5))
    x = case.logits.clone().requires_grad_()
    for _ in range(2):
        cross_entropy(x, case.target).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * gradient_of(case, torch.ones(4)))


def test_logits_without_grad_give_losses_without_grad(backend: str) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    target = torch.zeros(4, dtype=torch.int64)
    assert cross_entropy(x, target).requires_grad
    assert not cross_entropy(x.detach(), target).requires_grad
    with torch.no_grad():
        assert not cross_entropy(x, target).requires_grad
        weight = torch.rand(5, requires_grad=True)  # asks for nothing here
        cross_entropy(x, target, weight=weight)


def test_logits_written_between_forward_and_backward_raise(backend: str) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    y = x * 1
    losses = cross_entropy(y, torch.zeros(4, dtype=torch.int64))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_statistics_with_gaps(backend: str) -> None:
    x, y, upstream = torch.randn(6, 5), torch.arange(6) % 5, torch.randn(6)
    _, stats = torch.ops.ksam.cross_entropy(x, y, None, -100, 0.0)
    found, expected = (
        torch.ops.ksam.cross_entropy_backward(upstream, x, y, s, None, -100, 0.0)
        for s in (sliced(stats), stats)
    )
    assert same_bits(found, expected)


@pytest.mark.usefixtures("native")
def test_what_the_native_kernels_decline() -> None:
    """They would read past the end, or take numbers of one dtype for those of another."""
    x, y, upstream = torch.randn(6, 5), torch.arange(6) % 5, torch.ones(6)
    _, stats = extension.cross_entropy(x, y, None, -100, 0.0, True)

    def gradient(upstream: Tensor, stats: Tensor) -> Tensor | None:
        found: Tensor | None = extension.cross_entropy_backward(
            upstream, x, y, stats, None, -100, 0.0
        )
        return found

    assert gradient(upstream, stats) is not None
    for other in (upstream[:5], upstream.sum(), upstream.double(), upstream.bfloat16()):
        assert gradient(other, stats) is None
        assert extension.mse_backward(other, x, x) is None
        assert extension.binary_cross_entropy_with_logits_backward(other, x, x, None) is None
    for wrong in (stats[:5], stats.double(), sliced(stats)):
        assert gradient(upstream, wrong) is None
