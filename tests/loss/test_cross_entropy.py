"""Contract of ``cross_entropy``: values, against ``F.cross_entropy`` in float64."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ksam_kernels import cross_entropy, select_cross_entropy
from tests.helpers import FLOATS, U32, assert_within, bits, same_bits, sliced, transposed
from tests.loss.oracle import (
    KINDS,
    Case,
    check_losses_and_gradient,
    expected_losses,
    loss_tolerance,
    make_case,
    raises_bad_class,
)

CLASSES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 1000, 4097)
INF, NAN = float("inf"), float("nan")


def check(case: Case) -> Tensor:
    before = bits(case.logits)
    losses = cross_entropy(case.logits, case.target, **case.options)
    assert losses.dtype == torch.float32
    assert losses.shape == case.logits.shape[:-1]
    expected = expected_losses(case)
    assert_within(losses, expected, loss_tolerance(case, expected))
    assert torch.equal(bits(case.logits), before)
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_equal_those_of_torch(
    backend: str, dtype: torch.dtype, classes: int, kind: str
) -> None:
    check(make_case(kind, (3 * torch.randn(9, classes)).to(dtype)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,), (2, 3), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_shape(backend: str, rows: tuple[int, ...], kind: str) -> None:
    check(make_case(kind, torch.randn(*rows, 17)))


@pytest.mark.parametrize("layout", [sliced, transposed, lambda x: x[..., 2:-3], lambda x: x[::2]])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_logits(backend: str, dtype: torch.dtype, layout: object) -> None:
    for shape in ((6, 19), (3, 5, 33)):
        logits = layout(torch.randn(shape).to(dtype))  # type: ignore[operator]
        assert not logits.is_contiguous()
        for kind in KINDS:
            check(make_case(kind, logits))


def test_expanded_logits_and_strided_targets(backend: str) -> None:
    logits = torch.randn(1, 9).expand(6, 9)
    check(Case(logits, torch.randint(0, 9, (12,))[::2]))
    check(Case(logits, torch.randn(9, 6).softmax(0).t(), weight=torch.rand(18)[::2]))
    check(Case(torch.randn(9, 4, 6).movedim(0, -1), torch.randint(0, 9, (6, 4)).t()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "soft" not in kind])
def test_int32_targets_give_the_bits_of_int64_targets(backend: str, kind: str) -> None:
    case = make_case(kind, torch.randn(50, 11))
    narrow = cross_entropy(case.logits, case.target.int(), **case.options)
    assert same_bits(narrow, check(case))


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_and_probabilities_of_another_dtype(
    backend: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    logits = torch.randn(8, 17).to(dtype)
    weight = torch.rand(17).to(weight_dtype)
    check(Case(logits, torch.randint(0, 17, (8,)), weight, label_smoothing=0.2))
    check(Case(logits, torch.rand(8, 17).to(weight_dtype), weight, label_smoothing=0.2))


@pytest.mark.parametrize("number", [Fraction(1, 4), Decimal("0.25"), True, 1], ids=repr)
def test_smoothing_by_any_number(backend: str, number: Any) -> None:
    x, y = torch.randn(8, 17), torch.randint(0, 17, (8,))
    if isinstance(number, (Decimal, bool)):  # no numbers.Real, and no number
        with pytest.raises(TypeError, match="label_smoothing must be a number"):
            cross_entropy(x, y, label_smoothing=number)
        return
    expected = cross_entropy(x, y, label_smoothing=float(number))
    assert same_bits(cross_entropy(x, y, label_smoothing=number), expected)
    assert same_bits(select_cross_entropy(x, y, 3, label_smoothing=number)[0], expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_smoothing_up_to_its_bounds(backend: str, smoothing: float) -> None:
    logits = torch.randn(8, 17)
    check(Case(logits, torch.randint(0, 17, (8,)), label_smoothing=smoothing))
    check(Case(logits, torch.rand(8, 17), torch.rand(17), label_smoothing=smoothing))


def misranked_by(losses: Tensor, truth: Tensor) -> float:
    """The largest gap between two losses that stand in the wrong order."""
    ranked = truth[losses.argsort(descending=True, stable=True)]
    return (ranked - ranked.cummin(0).values).max().item()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_common_to_the_logits_costs_no_digits(backend: str, offset: float) -> None:
    logits, target = torch.randn(512, 100) + offset, torch.randint(0, 100, (512,))
    case = Case(logits, target)
    truth = expected_losses(case)
    tolerance = loss_tolerance(case, truth)
    losses = check(case)
    assert misranked_by(losses, truth) <= 2 * tolerance.max()
    # The test has teeth: rounding logsumexp(x) to float32 at 1e4 is off by up to 2^-11.
    naive = logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]
    assert ((naive - truth).abs() / tolerance).max() > 50
    assert misranked_by(naive, truth) > 50 * tolerance.max()


def test_bfloat16_logits_do_not_collapse_the_losses(backend: str) -> None:
    logits, target = torch.randn(4096, 10).bfloat16(), torch.randint(0, 10, (4096,))
    losses = cross_entropy(logits, target)
    from_float32 = cross_entropy(logits.float(), target)
    # Vectors of another width may add in another order: a last digit, so a few ties more or less.
    assert_within(losses, from_float32, 4 * U32 * (2 + from_float32))
    distinct = from_float32.unique().numel()
    assert abs(losses.unique().numel() - distinct) <= 0.01 * distinct
    in_bfloat16 = F.cross_entropy(logits, target, reduction="none")
    assert in_bfloat16.unique().numel() < distinct / 4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_give_zero_even_with_nan(
    backend: str, ignore_index: int, smoothing: float, dtype: torch.dtype
) -> None:
    logits, target = torch.randn(12, 7).to(dtype), torch.randint(4, 7, (12,))
    target[::3] = ignore_index
    logits[0], logits[3, 1], logits[6] = NAN, INF, -INF
    for weight in (None, torch.rand(7)):
        losses = check(Case(logits, target, weight, ignore_index, smoothing))
        assert torch.equal(losses[::3], torch.zeros(4))
        assert (losses[1::3] > 0).all()


def test_an_ignore_index_may_lie_above_the_classes(backend: str) -> None:
    losses = check(Case(torch.randn(3, 5), torch.tensor([255, 0, 4]), ignore_index=255))
    assert losses[0] == 0


SPECIAL_ROWS = {
    "the target at -inf": [-INF, 0.0, 1.0],
    "another at -inf": [0.0, -INF, 1.0],
    "all others at -inf": [0.0, -INF, -INF],
    "all at -inf": [-INF, -INF, -INF],
    "the target at inf": [INF, 0.0, 1.0],
    "another at inf": [0.0, INF, 1.0],
    "inf and -inf": [INF, -INF, 1.0],
    "a NaN": [0.0, NAN, 1.0],
    "the target at NaN": [NAN, 0.0, 1.0],
    "a wide range": [-3e4, 3e4, 0.0],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS.keys())
def test_infinities_and_nan_give_what_torch_gives(
    backend: str, row: list[float], dtype: torch.dtype
) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], dtype=dtype)
    hard = torch.tensor([0, 1])
    soft = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    for target in (hard, soft, soft.roll(1, 0)):
        for weight in (None, torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, 1.0])):
            for smoothing in (0.0, 0.1, 1.0):
                losses = check(Case(logits, target, weight, label_smoothing=smoothing))
                assert losses[1].isfinite()  # rows do not touch each other


def test_a_difference_above_the_range_of_float32_is_inf(backend: str) -> None:
    logits = torch.tensor([[-3e38, 3e38], [3e38, -3e38]])
    assert cross_entropy(logits, torch.tensor([0, 0])).tolist() == [INF, 0.0]


@pytest.mark.parametrize("slope", [300, -300], ids=["rise", "fall"])
@pytest.mark.parametrize("classes", [17, 100, 1000, 9000])
def test_logits_that_rise_or_fall_along_the_row(backend: str, classes: int, slope: int) -> None:
    """By more than exp() has room for, so that what was added up has to follow the maximum."""
    logits = slope * torch.linspace(-1, 1, classes) + torch.randn(13, classes)
    for kind in KINDS:
        check(make_case(kind, logits))


@pytest.mark.parametrize("low", [1, 2048, 5000])  # a thread's, a block's and a split row's part
def test_such_a_difference_between_parts_of_a_row_is_no_nan(backend: str, low: int) -> None:
    """One maximum is given up for another that is infinitely far from it."""
    classes = 2 * low + 63
    logits = torch.full((2, classes), 3e38)
    lanes = torch.arange(classes) % 16 < 4 if low == 1 else torch.arange(classes) < low
    logits[:, lanes] = -3e38
    target = torch.tensor([int(lanes.logical_not().nonzero()[0]), 0])
    found = cross_entropy(logits, target)
    high = torch.tensor(float(lanes.logical_not().sum()))
    torch.testing.assert_close(found, torch.stack([high.log(), torch.tensor(INF)]))


def test_smoothed_masks_are_finite(backend: str) -> None:
    """Each share of a masked logit is a number; the sum of two such logits is none."""
    low = torch.finfo(torch.float32).min
    logits = torch.randn(3, 40)
    logits[:, 20:24] = low
    target = torch.tensor([0, 1, 2])
    expected = cross_entropy(logits.double(), target, label_smoothing=0.1).float()
    assert expected.isfinite().all()
    torch.testing.assert_close(cross_entropy(logits, target, label_smoothing=0.1), expected)


@pytest.mark.parametrize(
    "bad", [-1, 5, 2**31 - 1, -(2**31)], ids=lambda bad: f"class {bad}".replace("-", "minus ")
)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_a_class_out_of_range_raises(backend: str, index: torch.dtype, bad: int) -> None:
    target = torch.tensor([0, 4, bad], dtype=index)
    with raises_bad_class(backend, f"target holds class {bad}, out of range for 5"):
        cross_entropy(torch.randn(3, 5), target)


def test_the_class_named_is_that_of_a_strided_target(backend: str) -> None:
    pairs = torch.tensor([[0, 7], [4, 7], [9, 7]])
    with raises_bad_class(backend, "target holds class 9, out of range for 5"):
        cross_entropy(torch.randn(3, 5), pairs[:, 0])


@pytest.mark.parametrize("layout", [sliced, lambda w: torch._neg_view(-w)], ids=["gaps", "negated"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_any_layout(
    backend: str, smoothing: float, layout: Callable[[Tensor], Tensor]
) -> None:
    x, y, weight = torch.randn(6, 5), torch.arange(6) % 5, layout(torch.rand(5))
    check_losses_and_gradient(Case(x, y, weight, label_smoothing=smoothing))


def requires_grad(*shape: int) -> Tensor:
    return torch.rand(shape, requires_grad=True)


X, Y = torch.randn(3, 5), torch.tensor([0, 1, 2])
REFUSED = {
    "logits no tensor": ([[1.0]], Y, {}, TypeError, "logits must be a tensor, got list"),
    "logits int": (X.long(), Y, {}, TypeError, r"logits must be float32.*got torch.int64"),
    "logits 0-d": (torch.tensor(1.0), Y, {}, ValueError, r"logits must be .*got shape \(\)"),
    "no class": (torch.randn(3, 0), Y, {}, ValueError, r"C >= 1, got shape \(3, 0\)"),
    "target no tensor": (X, [0, 1, 2], {}, TypeError, "target must be a tensor, got list"),
    "target uint8": (X, Y.byte(), {}, TypeError, "target must be int64, int32, got torch.uint8"),
    "target uint32": (X, Y.to(torch.uint32), {}, TypeError, "target must be .*got torch.uint32"),
    "target uint64": (X, Y.to(torch.uint64), {}, TypeError, "target must be .*got torch.uint64"),
    "target bool": (X, Y.bool(), {}, TypeError, "target must be int64, int32, got torch.bool"),
    "target short": (X, Y[:2], {}, ValueError, r"target must .*\(3,\), got shape \(2,\)"),
    "target [B, 1]": (X, Y[:, None], {}, ValueError, r"target must .*got shape \(3, 1\)"),
    "classes in dimension 1": (
        *(X[:, :, None], Y[:, None], {}, ValueError),
        r"one class per row of logits .*movedim.*, \(3, 5\), got shape \(3, 1\)",
    ),
    "soft target [C, B]": (X, X.t(), {}, ValueError, r"target must .*\(3, 5\), got .*\(5, 3\)"),
    "soft target float8": (X, X.to(torch.float8_e4m3fn), {}, TypeError, "target must be float32"),
    "soft target grad": (X, requires_grad(3, 5), {}, ValueError, "target must not require grad"),
    "ignore a class of soft targets": (
        *(X, X.softmax(1), {"ignore_index": 1}, ValueError),
        "ignore_index must be negative when target holds probabilities, .* got 1",
    ),
    "weight short": (
        *(X, Y, {"weight": torch.ones(4)}, ValueError),
        r"weight must have .*\(5,\), got shape \(4,\)",
    ),
    "weight a row": (
        X,
        Y,
        {"weight": torch.ones(1, 5)},
        ValueError,
        r"weight .*got shape \(1, 5\)",
    ),
    "weight a column": (
        *(X, Y, {"weight": torch.ones(5, 1)}, ValueError),
        r"weight must have .*\(5,\), got shape \(5, 1\)",
    ),
    "logits sparse": (X.to_sparse(), Y, {}, TypeError, "logits must be a dense tensor.*sparse_coo"),
    "weight int": (X, Y, {"weight": torch.ones(5).int()}, TypeError, "weight must be float32"),
    "weight grad": (X, Y, {"weight": requires_grad(5)}, ValueError, "weight must not require grad"),
    "smoothing < 0": (
        *(X, Y, {"label_smoothing": -0.1}, ValueError),
        r"label_smoothing must be in \[0.0, 1.0\], got -0.1",
    ),
    "smoothing > 1": (X, Y, {"label_smoothing": 1.5}, ValueError, "label_smoothing .*got 1.5"),
    "smoothing None": (
        *(X, Y, {"label_smoothing": None}, TypeError),
        "label_smoothing must be a number, got None",
    ),
    "ignore a fraction": (
        *(X, Y, {"ignore_index": 1.5}, TypeError),
        "ignore_index must be an int, got 1.5",
    ),
    "ignore too far": (
        *(X, Y, {"ignore_index": 2**63}, ValueError),
        "ignore_index must fit in 64 bits, got 9223372036854775808",
    ),
    "smoothing NaN": (X, Y, {"label_smoothing": NAN}, ValueError, "label_smoothing .*got nan"),
    "target elsewhere": (
        X,
        Y.to("meta"),
        {},
        ValueError,
        f"target must be on .*{X.device}, got meta",
    ),
    "weight elsewhere": (
        *(X, Y, {"weight": torch.ones(5, device="meta")}, ValueError),
        f"weight must be on the device of logits, {X.device}, got meta",
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_serve_raises_with_the_argument_and_the_value(
    backend: str, call: tuple[object, object, dict[str, object], type[Exception], str]
) -> None:
    logits, target, options, error, message = call
    with pytest.raises(error, match=message):
        cross_entropy(logits, target, **options)  # type: ignore[arg-type]


def test_the_lowest_int_of_64_bits_may_be_ignored(backend: str) -> None:
    x, y = torch.randn(3, 4), torch.arange(3)
    low = -(2**63)
    assert same_bits(cross_entropy(x, y, ignore_index=low), cross_entropy(x, y))
    y[1] = low
    assert cross_entropy(x, y, ignore_index=low)[1] == 0
