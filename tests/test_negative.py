"""Tensors with torch's negative bit, whose memory holds the negatives of their numbers.

They are what ``z.conj().imag`` is, and turn up where gradients come out of complex arithmetic. A
kernel that reads memory must not take them for what it finds there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import ksam_kernels
from tests.helpers import same_bits
from tests.perturb.lists import clones, empty_like


def imaginary(x: Tensor) -> Tensor:
    """The same numbers as the imaginary part of a conjugate: negated and of stride 2."""
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    return negated


LAYOUTS = {"imaginary": imaginary, "contiguous": lambda x: torch._neg_view(-x)}

X, Y = torch.randn(7, 5), torch.arange(7) % 5
SOFT = torch.rand(7, 5).softmax(1)

LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "cross_entropy": lambda x: ksam_kernels.cross_entropy(x, Y),
    "soft target": lambda x: ksam_kernels.cross_entropy(X, x),
    "select_cross_entropy": lambda x: ksam_kernels.select_cross_entropy(x, Y, 3),
    "bce": lambda x: ksam_kernels.binary_cross_entropy_with_logits(x, SOFT),
    "bce target": lambda x: ksam_kernels.binary_cross_entropy_with_logits(X, x),
    "mse": lambda x: ksam_kernels.mse(x, X),
    "mse target": lambda x: ksam_kernels.mse(X, x),
    "topk": lambda x: ksam_kernels.topk_indices(x[:, 0], 3),
    "compact": lambda x: ksam_kernels.compact_batch(x, torch.tensor([5, 0])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_functions_of_tensors_see_the_numbers(backend: str, name: str, layout: str) -> None:
    function = LOSSES[name]
    found, expected = function(LAYOUTS[layout](SOFT)), function(SOFT)
    if isinstance(expected, tuple):
        assert all(map(same_bits, found, expected))
    else:
        assert same_bits(found, expected)


@pytest.mark.parametrize("name", ["cross_entropy", "bce", "mse"])
def test_upstream_gradients_are_seen_with_their_sign(backend: str, name: str) -> None:
    x, upstream = torch.randn(7, 5, requires_grad=True), torch.randn(7)
    gradients = [
        torch.autograd.grad(LOSSES[name](x), x, g) for g in (imaginary(upstream), upstream)
    ]
    assert same_bits(gradients[0][0], gradients[1][0])


def one_wide(x: Tensor) -> Tensor:
    """As :func:`imaginary`, with a last dimension of one element and stride 1 where x has one."""
    if x.shape[-1] != 1:
        return imaginary(x)
    negated = imaginary(x.squeeze(-1)).unsqueeze(-1)
    assert negated.stride(-1) == 1
    return negated


SHAPES = ((4,), (3, 2), (4, 1), (1,))
W, G = [[torch.randn(shape) for shape in SHAPES] for _ in range(2)]


def updated(name: str, grads: list[Tensor]) -> list[Tensor]:
    """What a function on lists makes of the weights W, or the norm."""
    w, backup, v = clones(W), clones(W), [torch.zeros_like(p) for p in W]
    if name == "grad_norm":
        return [ksam_kernels.grad_norm(grads)]
    if name == "perturb_":
        ksam_kernels.perturb_(w, grads, backup, rho=0.5)
    elif name == "restore_sgd_":
        ksam_kernels.restore_sgd_(w, backup, grads, v, lr=0.1, momentum=0.9)
    else:
        steps = [torch.zeros(()) for _ in W]
        ksam_kernels.restore_adam_(w, backup, grads, v, clones(v), steps, lr=0.1)
    return w


@pytest.mark.parametrize("layout", [imaginary, one_wide])
@pytest.mark.parametrize("name", ["grad_norm", "perturb_", "restore_sgd_", "restore_adam_"])
def test_gradients_in_lists_are_seen_with_their_sign(
    backend: str, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    negated: list[Tensor] = tree_map(layout, G)
    # The order of a sum follows the layout.
    for found, expected in zip(updated(name, negated), updated(name, G), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_weights_that_are_negated_are_refused_or_moved_in_the_right_direction(
    backend: str,
) -> None:
    w, expected = imaginary(W[0]), W[0].clone()
    ksam_kernels.perturb_([expected], [G[0]], empty_like([expected]), rho=0.5)
    try:
        ksam_kernels.perturb_([w], [G[0]], empty_like([expected]), rho=0.5)
    except RuntimeError as error:  # the dispatcher's, about lists that are written
        assert "negation" in str(error)  # noqa: PT017
        expected = W[0]
    torch.testing.assert_close(w.resolve_neg(), expected)


@pytest.mark.parametrize("layout", [imaginary, one_wide])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gradient_that_is_alone_is_seen_with_its_sign(
    backend: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    """Beside others, one that a kernel declines would save it from being misread."""
    g = torch.randn(shape)
    found, expected = torch.zeros(shape), torch.zeros(shape)
    ksam_kernels.perturb_([found], [layout(g)], [found.clone()], rho=0.5)
    ksam_kernels.perturb_([expected], [g], [expected.clone()], rho=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_contiguous_losses_are_ranked_with_their_sign(backend: str) -> None:
    x = torch.randn(7)
    negated = torch._neg_view(-x)
    assert torch.equal(ksam_kernels.topk_indices(negated, 3), ksam_kernels.topk_indices(x, 3))
