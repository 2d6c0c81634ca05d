"""Logits whose rows lie side by side and whose classes are apart, as ``[B, C, H, W]`` has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ksam_kernels import cross_entropy, select_cross_entropy, topk_indices
from ksam_kernels.loss.layout import group_of, in_planes_of
from ksam_kernels.native import extension
from tests.helpers import FLOATS, bits, same_bits, threads
from tests.loss.oracle import (
    KINDS,
    Case,
    check_losses_and_gradient,
    make_case,
    raises_bad_class,
)

INF, NAN = float("inf"), float("nan")

# Classes: blocks of 128, by eights or fours. Rows of a group: vectors of 16, warps of 32.
CLASSES = (2, 3, 4, 5, 8, 9, 21, 127, 128, 129, 300)
GROUPS = (16, 17, 31, 32, 33, 49, 160)


def planes(images: int, classes: int, *sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits ``[images, *sides, classes]`` with the classes in dimension 1 of the memory."""
    return (3 * torch.randn(images, classes, *sides)).to(dtype).movedim(1, -1)


def check(case: Case) -> tuple[Tensor, Tensor]:
    """Losses and gradient, which lies in memory as the logits do."""
    x, before = case.logits.detach(), bits(case.logits)
    losses, gradient = check_losses_and_gradient(case)
    assert same_bits(losses, cross_entropy(x, case.target, **case.options))
    if group_of(x) > 0:  # others are copied first
        assert gradient.stride() == torch.empty_like(x).stride()
    assert torch.equal(bits(case.logits), before)
    return losses, gradient


def with_target_in_planes(case: Case) -> Case:
    if case.target.is_floating_point():
        case.target = case.target.movedim(-1, 1).contiguous().movedim(1, -1)
    return case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradient(backend: str, dtype: torch.dtype, classes: int, kind: str) -> None:
    case = make_case(kind, planes(2, classes, 5, 7, dtype=dtype))
    check(case)  # probabilities side by side
    check(with_target_in_planes(case))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_of_rows_in_a_group(backend: str, dtype: torch.dtype, group: int) -> None:
    for images in (1, 3):
        for kind in KINDS:
            check(with_target_in_planes(make_case(kind, planes(images, 6, group, dtype=dtype))))


LAYOUTS = {
    "[C, N]": lambda: torch.randn(5, 40).t(),
    "[B, C, T]": lambda: torch.randn(3, 5, 20).movedim(1, -1),
    "[C, B, T]": lambda: torch.randn(5, 3, 20).movedim(0, -1),
    "[B, C, D, H, W]": lambda: torch.randn(2, 5, 2, 3, 4).movedim(1, -1),
    "[B, C, 1, W]": lambda: torch.randn(2, 5, 1, 18).movedim(1, -1),
    "[B, D, C, H, W]": lambda: torch.randn(2, 3, 5, 4, 4).movedim(2, -1),
    "some classes": lambda: torch.randn(2, 9, 4, 5)[:, 2:7].movedim(1, -1),
    "every other class": lambda: torch.randn(2, 9, 4, 5)[:, ::2].movedim(1, -1),
    "some images": lambda: torch.randn(6, 5, 4, 5)[1::2].movedim(1, -1),
    "one image for all": lambda: torch.randn(1, 5, 4, 5).expand(3, 5, 4, 5).movedim(1, -1),
    "one class for all": lambda: torch.randn(2, 1, 4, 5).expand(2, 5, 4, 5).movedim(1, -1),
    "cropped": lambda: torch.randn(2, 5, 6, 6)[:, :, 1:, 1:].movedim(1, -1),
    "every other column": lambda: torch.randn(2, 5, 6, 8)[..., ::2].movedim(1, -1),
    "few rows": lambda: torch.randn(2, 5, 2, 3).movedim(1, -1),
    "columns before rows": lambda: torch.randn(2, 5, 6, 4).transpose(2, 3).movedim(1, -1),
    "from the middle": lambda: torch.randn(2 * 5 * 20 + 3)[3:].view(2, 5, 20).movedim(1, -1),
    "no image": lambda: torch.randn(0, 5, 4, 5).movedim(1, -1),
    "no pixel": lambda: torch.randn(2, 5, 0, 5).movedim(1, -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(backend: str, name: str) -> None:
    for kind in KINDS:
        case = make_case(kind, LAYOUTS[name]())
        check(case)
        if case.target.is_floating_point():
            case.target = LAYOUTS[name]().softmax(-1)
            check(case)


def test_rows_of_no_class_raise(backend: str) -> None:
    with pytest.raises(ValueError, match="C >= 1"):
        cross_entropy(torch.empty(20, 0), torch.full((20,), -100))


def test_rows_that_overlap(backend: str) -> None:
    """Their classes are side by side, and so are they."""
    x, target = torch.randn(2, 49, requires_grad=True), torch.randint(30, (2, 20))

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x.unfold(1, 30, 1), target).sum()

    for function in (loss, torch.compile(loss, backend="aot_eager")):
        (gradient,) = torch.autograd.grad(function(x), x)
        rows = x.detach().unfold(1, 30, 1)
        expected = rows.softmax(-1) - F.one_hot(target, 30)
        summed = torch.zeros(2, 49)
        for i in range(20):
            summed[:, i : i + 30] += expected[:, i]
        torch.testing.assert_close(gradient, summed)


def test_a_dimension_of_one_says_nothing_of_the_layout(backend: str) -> None:
    logits = torch.randn(1, 33, 3, 16).permute(2, 3, 0, 1)
    weight = torch.rand(33, dtype=torch.float64)
    check(Case(logits, torch.randint(33, (3, 16, 1)), weight))
    check(Case(planes(2, 5, 20).unsqueeze(-2), torch.randint(5, (2, 20, 1)), weight[:5]))


def test_classes_of_any_layout(backend: str) -> None:
    logits = planes(4, 5, 4, 6)
    check(Case(logits, torch.randint(5, (4, 6, 4)).transpose(1, 2)))
    check(Case(logits, torch.randint(5, (4, 4, 12), dtype=torch.int32)[..., ::2]))
    check(Case(logits, torch.randint(5, (1, 4, 6)).expand(4, 4, 6)))
    check(Case(logits, torch.randint(5, (4, 4, 6)), torch.rand(5, dtype=torch.float64)))


def test_a_loss_and_gradient_as_f_cross_entropy_gives_them(backend: str) -> None:
    """The gradient arrives at ``[B, C, H, W]`` contiguous, where a convolution wants it."""
    x = torch.randn(3, 7, 8, 8, requires_grad=True)
    target = torch.randint(7, (3, 8, 8))
    target[0, :3] = 255
    cross_entropy(x.movedim(1, -1), target, ignore_index=255).flatten(1).mean(1).sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous()
    losses = F.cross_entropy(x.double(), target, ignore_index=255, reduction="none")
    (expected,) = torch.autograd.grad(losses.flatten(1).mean(1).sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ignored_rows_are_zero_even_with_nan(
    backend: str, dtype: torch.dtype, smoothing: float
) -> None:
    logits, target = planes(2, 6, 5, 7, dtype=dtype), torch.randint(6, (2, 5, 7))
    ignored = torch.rand(2, 5, 7) < 0.3
    target[ignored] = 255
    logits[ignored] = torch.tensor([NAN, INF, -INF, 0.0, 1.0, NAN], dtype=dtype)
    x = logits.requires_grad_()
    losses = cross_entropy(x, target, ignore_index=255, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert (losses[ignored] == 0).all()
    assert (gradient[ignored] == 0).all()
    assert (losses[~ignored] > 0).all()
    assert (gradient[~ignored] != 0).all()


@pytest.mark.parametrize("classes", [5, 40])
def test_an_infinite_weight_of_a_class_that_no_row_has_changes_nothing(
    backend: str, classes: int
) -> None:
    x, target = planes(2, classes, 20).requires_grad_(), torch.zeros(2, 20, dtype=torch.int64)
    found = []
    for other in (1.0, INF):
        weight = torch.ones(classes)
        weight[1] = other
        losses = cross_entropy(x, target, weight=weight)
        found.append((losses.detach(), *torch.autograd.grad(losses.sum(), x)))
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("row", [[INF, 0.0, 1.0], [-INF] * 3, [0.0, NAN, 1.0]], ids=str)
def test_a_row_whose_loss_is_nan_leaves_its_neighbours(backend: str, row: list[float]) -> None:
    for classes in (3, 150):
        logits = planes(1, classes, 40)
        logits[0, 17, :3] = torch.tensor(row)
        if row == [-INF] * 3:
            logits[0, 17] = -INF
        x = logits.detach().requires_grad_()
        losses = cross_entropy(x, torch.zeros(1, 40, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        at = torch.arange(40) == 17
        assert torch.equal(losses[0].isnan(), at)
        assert torch.equal(gradient[0].isnan().all(1), at)
        assert gradient[0][~at].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [40, 300])
def test_maxima_that_rise_from_block_to_block(backend: str, classes: int, kind: str) -> None:
    rising = torch.linspace(0, 80, classes)
    for offset in (rising, -rising, rising.flip(0) ** 2 / 10, 1e4 + 0 * rising):
        case = make_case(kind, (torch.randn(2, 33, classes) + offset))
        case.logits = case.logits.movedim(-1, 1).contiguous().movedim(1, -1)
        check(case)


@pytest.mark.parametrize("level", [-300.0, 0.0, 300.0])
def test_a_block_of_minus_infinity_before_the_first_number(backend: str, level: float) -> None:
    logits = planes(1, 300, 20) + level
    logits = logits.movedim(-1, 1).contiguous().movedim(1, -1)
    logits[..., :140] = -INF
    target = torch.randint(140, 300, (1, 20))
    check(Case(logits, target))
    check(Case(logits[..., ::2], target // 2))
    weight = (torch.arange(300) >= 140).float()  # nothing is infinite
    losses = cross_entropy(logits, target, weight=weight)
    assert same_bits(losses, cross_entropy(logits, target))


def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    x, target = torch.randn(2, 11, 70), torch.randint(11, (2, 70))
    whole = cross_entropy(x.movedim(1, -1), target)
    other = torch.randn(2, 11, 70)
    other[..., 20:55] = x[..., 20:55]
    mixed = cross_entropy(other.movedim(1, -1), target)
    assert same_bits(mixed[:, 20:55], whole[:, 20:55])


def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    case = make_case("weighted smoothed", planes(3, 21, 41, 43))
    upstream = torch.randn(3, 41, 43)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            x = case.logits.detach().requires_grad_()
            losses = cross_entropy(x, case.target, **case.options)
            found.append((losses.detach(), *torch.autograd.grad(losses, x, upstream)))
    for losses, gradient in found[1:]:
        assert same_bits(losses, found[0][0])
        assert same_bits(gradient, found[0][1])


@pytest.mark.parametrize("bad", [-1, 6])
def test_a_class_out_of_range_raises(backend: str, bad: int) -> None:
    target = torch.randint(6, (2, 5, 7))
    target[1, 2, 3] = bad
    with raises_bad_class(backend, f"^target holds class {bad}, out of range for 6 classes$"):
        cross_entropy(planes(2, 6, 5, 7), target)


def test_selection(backend: str) -> None:
    for rows in (16, 40, 200):
        logits, target = torch.randn(9, rows).t(), torch.randint(9, (rows,))
        losses, indices = select_cross_entropy(logits, target, rows // 3)
        assert same_bits(losses, cross_entropy(logits, target))
        assert torch.equal(indices, topk_indices(losses, rows // 3))


def test_few_rows_of_many_classes(backend: str) -> None:
    """Threads of a GPU then share a row, each with several batches of its classes."""
    for classes in (1000, 4099):
        for kind in KINDS:
            check(with_target_in_planes(make_case(kind, planes(1, classes, 18))))


def test_probabilities_that_lie_as_the_logits_are_read_as_they_lie() -> None:
    x, p = planes(3, 5, 4, 4), planes(3, 5, 4, 4)
    assert in_planes_of(x, p) is p
    assert in_planes_of(x, p.contiguous()).stride() == x.stride()


def test_more_classes_than_float32_counts_are_no_planes() -> None:
    """As the kernels decline them: so one copy serves both passes."""
    for classes, group in ((2**24 - 1, 16), (2**24, 0)):
        assert group_of(torch.empty(classes, 16, device="meta").T) == group


@pytest.mark.usefixtures("native")
def test_groups_of_less_than_a_vector_are_no_planes() -> None:
    """The vector would begin before the first of them."""
    for rows, taken in ((15, False), (16, True)):
        x, y = torch.randn(1, 6, rows).movedim(1, -1), torch.zeros(1, rows, dtype=torch.int64)
        assert (extension.cross_entropy(x, y, None, -100, 0.0, True) is not None) == taken
