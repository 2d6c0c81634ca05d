"""Losses where kernels change gear: vector and block boundaries, late maxima, threads, strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ksam_kernels import binary_cross_entropy_with_logits, cross_entropy, mse, select_cross_entropy
from tests.helpers import FLOATS, same_bits, threads
from tests.loss.oracle import (
    KINDS,
    Case,
    check_losses_and_gradient,
    make_case,
    raises_bad_class,
)

INF, NAN = float("inf"), float("nan")

# The native kernels: vectors of 16, blocks of 2048 with a remainder below 16 taken along.
BLOCK = 2048
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 15, BLOCK + 16)
LONG = 3 * BLOCK + 17


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", EDGES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_element_counts_once(
    backend: str, dtype: torch.dtype, classes: int, kind: str
) -> None:
    check_losses_and_gradient(make_case(kind, (3 * torch.randn(3, classes)).to(dtype)))


@pytest.mark.parametrize("classes", EDGES)
@pytest.mark.parametrize("at", ["first", "last"])
def test_a_target_at_either_end(backend: str, classes: int, at: str) -> None:
    y = torch.full((17,), 0 if at == "first" else classes - 1)
    check_losses_and_gradient(
        Case(torch.randn(17, classes), y, torch.rand(classes) + 0.5, label_smoothing=0.1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_maximum_that_rises_from_block_to_block(backend: str, kind: str) -> None:
    rising = torch.linspace(0, 80, LONG).expand(4, LONG)
    check_losses_and_gradient(make_case(kind, torch.randn(4, LONG) + rising))
    check_losses_and_gradient(make_case(kind, torch.randn(4, LONG) - rising))
    late = torch.randn(4, LONG)
    late[:, -1] = 300
    check_losses_and_gradient(make_case(kind, late))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_common_to_a_long_row(backend: str, offset: float, kind: str) -> None:
    check_losses_and_gradient(make_case(kind, torch.randn(4, LONG) + offset))


@pytest.mark.parametrize("level", [-300.0, 0.0, 300.0])
def test_a_block_of_minus_infinity_before_the_first_number(backend: str, level: float) -> None:
    logits = torch.randn(4, LONG) + level
    logits[:, : BLOCK + 5] = -INF
    target = torch.randint(BLOCK + 5, LONG, (4,))
    check_losses_and_gradient(Case(logits, target))
    for options in ({"label_smoothing": 0.1}, {"weight": torch.rand(LONG), "label_smoothing": 0.1}):
        case = Case(logits, target, **options)  # type: ignore[arg-type]
        losses = cross_entropy(logits, target, **case.options)
        assert torch.equal(losses, torch.full((4,), INF))
    weight = torch.ones(LONG)
    weight[:7] = 0  # 0 * inf
    losses = cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
    assert losses.isnan().all()


@pytest.mark.parametrize("classes", [3, 16, 33, LONG])
def test_rows_without_a_loss(backend: str, classes: int) -> None:
    logits = torch.randn(6, classes)
    logits[0], logits[1] = -INF, NAN
    logits[2, -1], logits[3, -1] = INF, NAN
    logits[4, 0] = INF
    target = torch.zeros(6, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        losses = cross_entropy(logits, target, label_smoothing=smoothing)
        assert losses[:5].isnan().all()
        assert losses[5].isfinite()


@pytest.mark.parametrize("classes", [5, 40])
def test_zeros_of_either_sign_are_equal(backend: str, classes: int) -> None:
    zeros = torch.zeros(3, classes)
    zeros[:, ::2] = -0.0
    target = torch.zeros(3, dtype=torch.int64)
    assert same_bits(cross_entropy(zeros, target), cross_entropy(zeros.abs(), target))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [7, 21, BLOCK + 3])
def test_probabilities_of_another_dtype(
    backend: str, classes: int, target_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    target = torch.randn(5, classes).softmax(1).to(target_dtype)
    check_losses_and_gradient(Case(torch.randn(5, classes).to(dtype), target))


SHORT_ROWS = [(19, 5), (19, 16), (19, 33), (19, 1000)]
LONG_ROWS = [(19, 4096), (19, 4097), (97, 512), (2, 8192), (2, 40960)]


# Rows of whole vectors among them, which a kernel of their own may read: short ones, long ones, so
# few that several blocks have each, and, on the simulated GPU, so many that a warp does.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("count", "classes"), SHORT_ROWS + LONG_ROWS)
def test_any_stride_between_rows_gives_the_same_bits(
    backend: str, count: int, classes: int, dtype: torch.dtype
) -> None:
    wide = torch.full((2 * count, classes + 3), NAN, dtype=dtype)
    rows = wide[::2, 1 : 1 + classes]
    rows.copy_(torch.randn(count, classes))
    for kind in KINDS:
        case = make_case(kind, rows)
        strided = cross_entropy(rows, case.target, **case.options)
        assert same_bits(strided, cross_entropy(rows.contiguous(), case.target, **case.options))


def results(x: Tensor, probabilities: Tensor, case: Case) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    losses, indices = select_cross_entropy(x, case.target, 5, **case.options)
    others = [cross_entropy(x, case.target, **case.options), indices]
    for loss in (binary_cross_entropy_with_logits, mse):
        others.append(loss(x, probabilities))
    return [losses, *others, *torch.autograd.grad(losses.sum() + others[-1].sum(), x)]


@pytest.mark.parametrize("shape", [(20001, 7), (3001, 33), (37, 5000)], ids=str)
@pytest.mark.parametrize("kind", ["hard", "weighted smoothed", "soft"])
def test_the_number_of_threads_changes_no_bit(
    backend: str, kind: str, shape: tuple[int, int]
) -> None:
    case = make_case(kind, torch.randn(shape))
    probabilities = torch.rand(shape)  # made once: torch's own functions may differ in a bit
    with threads(1):
        one = results(case.logits, probabilities, case)
    with threads(2):
        two = results(case.logits, probabilities, case)
    for a, b in zip(one, two, strict=True):
        assert same_bits(a, b)


def test_the_first_bad_class_is_named_whatever_thread_finds_one(backend: str) -> None:
    target = torch.zeros(40000, dtype=torch.int64)
    target[11], target[500], target[39000] = 77, 88, 99
    for rows in (target, target.int()):
        message = r"^target holds class 77, out of range for 5 classes$"
        with threads(2), raises_bad_class(backend, message):
            cross_entropy(torch.zeros(40000, 5), rows)


def test_the_backward_operator_checks_classes_too(backend: str) -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    _, stats = torch.ops.ksam.cross_entropy(logits, target, None, -100, 0.0)
    with raises_bad_class(backend, "target holds class 5, out of range for 5"):
        torch.ops.ksam.cross_entropy_backward(
            torch.ones(3), logits, target + 3, stats, None, -100, 0.0
        )
