"""Contract of ``select_cross_entropy``: ``cross_entropy`` and ``topk_indices`` in one operator."""

from __future__ import annotations

import pytest
import torch

from ksam_kernels import cross_entropy, select_cross_entropy, topk_indices
from tests.helpers import FLOATS, same_bits, sliced
from tests.loss.oracle import KINDS, make_case, raises_bad_class


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_losses_are_those_of_cross_entropy_bit_for_bit_and_indices_their_top_k(
    backend: str, dtype: torch.dtype, classes: int, kind: str
) -> None:
    for rows in (1, 64, 131):
        case = make_case(kind, torch.randn(rows, classes).to(dtype))
        for k in sorted({1, (rows + 1) // 2, rows}):
            losses, indices = select_cross_entropy(case.logits, case.target, k, **case.options)
            alone = cross_entropy(case.logits, case.target, **case.options)
            assert same_bits(losses, alone)
            assert torch.equal(indices, topk_indices(alone, k))


def test_ties_nan_and_ignored_rows_are_ranked_as_topk_ranks_them(backend: str) -> None:
    logits = torch.randn(9, 4).repeat(3, 1)
    logits[5], logits[7] = float("nan"), float("nan")
    target = torch.randint(0, 4, (9,)).repeat(3)
    target[7], target[8] = -100, -100
    for k in (1, 2, 13, 27):
        losses, indices = select_cross_entropy(sliced(logits), target, k)
        assert same_bits(losses, cross_entropy(sliced(logits), target))
        assert torch.equal(indices, topk_indices(losses, k))
    assert select_cross_entropy(logits, target, 1)[1].tolist() == [5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_cross_entropy(backend: str, kind: str) -> None:
    case = make_case(kind, torch.randn(16, 10))
    x, y = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
    losses, indices = select_cross_entropy(x, case.target, 4, **case.options)
    assert losses.requires_grad
    assert not indices.requires_grad
    losses[indices].mean().backward()
    cross_entropy(y, case.target, **case.options)[indices].mean().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert same_bits(x.grad, y.grad)
    others = torch.ones(16, dtype=torch.bool)
    others[indices] = False
    assert (x.grad[others] == 0).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)], ids=str)
def test_logits_of_another_rank_raise(backend: str, shape: tuple[int, ...]) -> None:
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must be \[B, C\] to select rows, got shape"):
        select_cross_entropy(torch.zeros(shape), target, 1)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_outside_one_to_batch_size_raises(backend: str, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\] for 3 losses, got {k}"):
        select_cross_entropy(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), k)


@pytest.mark.parametrize("k", [True, 1.0])
def test_a_k_that_is_no_int_raises(backend: str, k: object) -> None:
    with pytest.raises(TypeError, match="k must be an int"):
        select_cross_entropy(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), k)  # type: ignore[arg-type]


def test_it_refuses_what_cross_entropy_refuses(backend: str) -> None:
    x, y = torch.zeros(3, 5), torch.tensor([0, 1, 9])
    with raises_bad_class(backend, "target holds class 9"):
        select_cross_entropy(x, y, 1)
    with pytest.raises(ValueError, match=r"label_smoothing .*got 2"):
        select_cross_entropy(x, y, 1, label_smoothing=2)
    with pytest.raises(ValueError, match="weight must have"):
        select_cross_entropy(x, y, 1, weight=torch.ones(4))
    with pytest.raises(TypeError, match="target must be int64"):
        select_cross_entropy(x, y.bool(), 1)
