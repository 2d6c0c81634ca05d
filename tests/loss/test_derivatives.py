"""Derivatives beyond a kernel's one: second and third, forward-mode, and ``torch.func``'s."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ksam_kernels import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse,
    select_cross_entropy,
    topk_indices,
)
from tests.helpers import FLOATS, U32, arithmetic_unit, assert_within, smallest, unit
from tests.loss.oracle import KINDS, expected_losses, make_case

B, C = 6, 5
Loss = Callable[[Tensor], Tensor]
NAN = float("nan")


def per_sample(elements: Tensor) -> Tensor:
    return elements.flatten(1).mean(1)


def loss_and_oracle(name: str) -> tuple[Loss, Loss]:
    """A loss of logits ``[B, C]``, and torch's of float64."""
    if name.removesuffix(" selected") in KINDS:
        case = make_case(name.removesuffix(" selected"), torch.empty(B, C))
        if not case.target.is_floating_point():
            case.ignore_index = int(case.target[0])

        def ours(x: Tensor) -> Tensor:
            if name.endswith("selected"):
                return select_cross_entropy(x, case.target, 2, **case.options)[0]
            return cross_entropy(x, case.target, **case.options)

        return ours, lambda x: expected_losses(case, x)
    t, p = torch.rand(B, C), torch.rand(C) * 3
    if name == "mse":
        oracle = lambda x: per_sample(F.mse_loss(x, t.to(x), reduction="none"))  # noqa: E731
        return lambda x: mse(x, t), oracle
    return lambda x: binary_cross_entropy_with_logits(x, t, pos_weight=p), lambda x: per_sample(
        F.binary_cross_entropy_with_logits(x, t.to(x), pos_weight=p.to(x), reduction="none")
    )


NAMES = (*KINDS, "hard selected", "bce", "mse")


def derivatives(loss: Loss, x: Tensor, upstream: Tensor, *along: Tensor) -> list[Tensor]:
    """Of ``sum(upstream * loss(x))`` by x and by the upstream gradient; then of the inner product
    of the derivative by x with each further tensor in turn. Linear: roundings do not go on."""
    x, g = x.clone().requires_grad_(), upstream.clone().requires_grad_()
    results, scalar = [], (loss(x) * g).sum()
    for direction in (*along, None):
        by_x, by_g = torch.autograd.grad(scalar, (x, g), create_graph=True, materialize_grads=True)
        results += [by_x.detach(), by_g.detach()]
        if direction is not None:
            scalar = (by_x * direction.to(by_x)).sum()
    return results


def tolerance(x: Tensor, upstream: Tensor, *along: Tensor) -> float:
    """A bound for any of those derivatives before it is rounded to its dtype.

    Each is a sum of at most 8 C products of probabilities (of sigmoids), the class's or the
    element's weight (here at most 3), the upstream gradient and an element of every direction. A
    probability's error is that of ``gradient_tolerance``, relative, and the products and the sum
    have fewer than 16 + 2 C roundings.
    """
    log_p = x.double().log_softmax(-1)
    roundings = 24 + math.sqrt(C) + 2 * C + 3 * log_p.abs().max().item()
    size = math.prod(t.abs().max().item() for t in (upstream, *along))
    return 8 * C * 3 * max(size, 1.0) * roundings * arithmetic_unit(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_second_and_third_derivatives_are_those_of_torch(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    loss, oracle = loss_and_oracle(name)
    x, upstream = torch.randn(B, C).to(dtype), torch.rand(B)
    along = torch.randn(B, C).to(dtype), torch.randn(B, C).to(dtype)
    found = derivatives(loss, x, upstream, *along)
    expected = derivatives(oracle, x.double(), upstream.double(), *along)
    bound = tolerance(x, upstream, *along)
    for result, truth, of in zip(found, expected, 3 * (x, upstream), strict=True):
        assert result.dtype == of.dtype
        assert_within(result, truth, bound + unit(of.dtype) * truth.abs() + smallest(of.dtype))
    assert any(truth.abs().max() > 100 * bound for truth in expected[2:])


@pytest.mark.parametrize("name", NAMES)
def test_an_upstream_gradient_that_comes_from_the_logits_counts_once(
    backend: str, name: str
) -> None:
    loss, oracle = loss_and_oracle(name)
    x = torch.randn(B, C, dtype=torch.float64, requires_grad=True)

    def curvature(loss: Loss) -> Tensor:
        scalar = loss(x).square().sum()
        (first,) = torch.autograd.grad(scalar, x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    # Losses are of the order of 5 and float32, and a product of two is what is differentiated.
    assert_within(curvature(loss), curvature(oracle), 1000 * unit(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_functions_give_what_autograd_gives(backend: str, name: str) -> None:
    loss, oracle = loss_and_oracle(name)
    x, tangent = torch.randn(B, C), torch.randn(B, C)
    bound = tolerance(x, torch.ones(1), tangent)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        found = transform(lambda x: loss(x).sum())(x)
        expected = transform(lambda x: oracle(x).sum())(x.double())
        assert_within(found, expected, bound)
    found = torch.func.jvp(loss, (x,), (tangent,))
    expected = torch.func.jvp(oracle, (x.double(),), (tangent.double(),))
    for result, truth in zip(found, expected, strict=True):
        assert result.dtype == torch.float32
        assert_within(result, truth, bound)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent)))
        assert_within(dual.tangent, expected[1], bound)


@pytest.mark.parametrize("function", ["cross_entropy", "bce", "mse"])
def test_gradients_of_single_samples_are_the_rows_of_the_batch(backend: str, function: str) -> None:
    losses = {"cross_entropy": cross_entropy, "bce": binary_cross_entropy_with_logits, "mse": mse}
    loss = losses[function]
    x = torch.randn(B, C)
    target = torch.randint(0, C, (B,)) if function == "cross_entropy" else torch.rand(B, C)

    def of_one(x: Tensor, t: Tensor) -> Tensor:
        return loss(x.unsqueeze(0), t.unsqueeze(0)).squeeze(0)

    each = torch.func.vmap(torch.func.grad(of_one))(x, target)
    z = x.clone().requires_grad_()
    (together,) = torch.autograd.grad(loss(z, target).sum(), z)
    assert_within(each, together, tolerance(x, torch.ones(1)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of top-k, over which it loops
def test_vmap_selects_in_every_batch(backend: str) -> None:
    x, y = torch.randn(3, B, C), torch.randint(0, C, (B,))
    losses, indices = torch.func.vmap(lambda x: select_cross_entropy(x, y, 2))(x)
    for i in range(3):
        assert torch.equal(indices[i], topk_indices(losses[i], 2))

    def loss_and_indices(x: Tensor) -> tuple[Tensor, Tensor]:
        losses, indices = select_cross_entropy(x, y, 2)
        return losses.sum(), indices

    gradient, indices = torch.func.grad(loss_and_indices, has_aux=True)(x[0])
    assert torch.equal(indices, topk_indices(losses[0], 2))
    assert_within(gradient, torch.func.grad(lambda x: cross_entropy(x, y).sum())(x[0]), 0)


def test_ignored_rows_have_no_derivative_even_of_nan(backend: str) -> None:
    x, y = torch.randn(3, C), torch.tensor([1, -100, 2])
    x[1, 2] = NAN
    z = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cross_entropy(z, y).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    func = torch.func.grad(lambda x: cross_entropy(x, y).sum())(x)
    for result in (first, second, func):
        assert torch.equal(result[1], torch.zeros(C))
        assert result[::2].isfinite().all()
        assert result[::2].abs().amax() > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_a_transform_refuses_it_refuses_by_name(backend: str, name: str) -> None:
    loss, _ = loss_and_oracle(name)
    with pytest.raises(ValueError, match="shape"):
        torch.func.grad(lambda x: loss(x).sum())(torch.randn(C))
    with pytest.raises(TypeError, match="float32, bfloat16"):
        torch.func.vmap(loss)(torch.zeros(2, B, C, dtype=torch.int64))


@pytest.mark.parametrize("name", ["hard", "bce", "mse"])
def test_compiled_transforms_give_what_eager_ones_give(backend: str, name: str) -> None:
    """PyTorch's compiler took the tangent of a custom operator for zero."""
    loss, _ = loss_and_oracle(name)
    x, tangent = torch.randn(B, C), torch.randn(B, C)
    bound = tolerance(x, torch.ones(1), tangent)

    def forward_mode(x: Tensor) -> Tensor:
        return torch.func.jvp(loss, (x,), (tangent,))[1]

    for function in (torch.func.grad(lambda x: loss(x).sum()), forward_mode):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_within(compiled(x), function(x), bound)


def test_a_compiled_loss_is_its_operator_and_nothing_else(backend: str) -> None:
    """torch.compile keeps no program of more for the next process but what it knows."""
    targets = []

    def note(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        targets.extend(n.target for n in module.graph.nodes if n.op == "call_function")
        return module.forward

    x, t, y = torch.randn(4, 5), torch.rand(4, 5), torch.tensor([0, 1, 2, 3])

    def losses(x: Tensor) -> tuple[Tensor, ...]:
        return (
            cross_entropy(x, y),
            mse(x, t),
            binary_cross_entropy_with_logits(x, t),
        )

    torch.compile(losses, backend=note, fullgraph=True)(x)
    names = [str(target) for target in targets if target is not operator.getitem]
    assert names == [
        "ksam.cross_entropy", "ksam.mse", "ksam.binary_cross_entropy_with_logits"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_two_dimensions_have_the_derivatives_of_rows_in_one(
    backend: str, kind: str, dtype: torch.dtype
) -> None:
    case = make_case(kind, torch.randn(B, C).to(dtype))
    target, tangent = case.target.unflatten(0, (2, 3)), torch.randn(B, C).to(dtype)

    def apart(x: Tensor) -> Tensor:
        return cross_entropy(x.unflatten(0, (2, 3)), target, **case.options)

    along = (case.logits,), (tangent,)
    expected = torch.func.jvp(lambda x: cross_entropy(x, case.target, **case.options), *along)
    for found, truth in zip(torch.func.jvp(apart, *along), expected, strict=True):
        assert found.dtype == torch.float32
        assert_within(found, truth.unflatten(0, (2, 3)), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_pos_weight_of_another_dtype_is_as_exact_in_a_transform(
    backend: str, dtype: torch.dtype
) -> None:
    x, t, p = torch.randn(B, C), torch.rand(B, C), (torch.rand(C) * 3).to(dtype)

    def losses(x: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(x, t, pos_weight=p)

    found, expected = torch.func.jvp(losses, (x,), (x,))[0], losses(x)
    assert_within(found, expected, 16 * U32 * expected.abs().max())
