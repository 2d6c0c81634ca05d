"""Eager losses reach autograd without the dispatcher, and everything else through it: alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ksam_kernels import (
    backends,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse,
    select_cross_entropy,
)
from tests.helpers import FLOATS, same_bits, sliced, transposed
from tests.loss.oracle import raises_bad_class

B, C = 7, 5
Loss = Callable[[Tensor], Tensor]


def losses_by_name(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Loss, Loss]]:
    """Every differentiable loss: the public function, and the operator of the same arguments."""
    ops = torch.ops.ksam
    y, weight = torch.randint(0, C, (B,)), torch.rand(C)
    target = torch.rand(B, C).to(dtype)
    options = {"weight": weight, "ignore_index": 2, "label_smoothing": 0.1}
    return {
        "cross_entropy": (
            lambda x: cross_entropy(x, y, **options),
            lambda x: ops.cross_entropy(x, y, *options.values())[0],
        ),
        "soft cross_entropy": (
            lambda x: cross_entropy(x, target),
            lambda x: ops.cross_entropy(x, target, None, -100, 0.0)[0],
        ),
        "select_cross_entropy": (
            lambda x: select_cross_entropy(x, y, 3, **options)[0],
            lambda x: ops.select_cross_entropy(x, y, 3, *options.values())[0],
        ),
        "binary_cross_entropy_with_logits": (
            lambda x: binary_cross_entropy_with_logits(x, target, pos_weight=weight),
            lambda x: ops.binary_cross_entropy_with_logits(x, target, weight),
        ),
        "mse": (lambda x: mse(x, target), lambda x: ops.mse(x, target)),
    }


LOSSES = {name: function for name, (function, _) in losses_by_name().items()}
NAMES = list(LOSSES)


@pytest.fixture
def no_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of ``torch.ops.ksam`` is an error."""

    class Refused:
        def __getattr__(self, name: str) -> Callable[..., None]:
            raise AssertionError(f"{name} went through the dispatcher")

    monkeypatch.setattr(torch.ops, "ksam", Refused())


def gradient(loss: Loss, x: Tensor, upstream: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    losses = loss(x)
    assert losses.requires_grad
    (result,) = torch.autograd.grad(losses, x, upstream)
    return result


@pytest.mark.parametrize("layout", [Tensor.clone, sliced, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_have_the_bits_of_the_operators(
    backend: str, name: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    function, operator = losses_by_name(dtype)[name]
    x = layout(torch.randn(B, C).to(dtype))
    without = function(x)
    assert same_bits(without, operator(x))
    assert same_bits(without, function(x.requires_grad_()))
    for upstream in (torch.randn(B), torch.ones(()).expand(B), torch.randn(B, 2)[:, 1]):
        assert same_bits(gradient(function, x, upstream), gradient(operator, x, upstream))


@pytest.mark.usefixtures("no_dispatcher")
@pytest.mark.parametrize("kind", [Tensor, torch.nn.Parameter], ids=["Tensor", "Parameter"])
def test_eager_tensors_do_not_meet_the_dispatcher(backend: str, kind: type[Tensor]) -> None:
    y, target = torch.randint(0, C, (B,)), torch.rand(B, C)
    x = torch.randn(B, C, requires_grad=True)
    x = x if kind is Tensor else torch.nn.Parameter(x.detach())
    for losses in (
        cross_entropy(x, y),
        select_cross_entropy(x, y, 3)[0],
        binary_cross_entropy_with_logits(x, target),
        mse(x, target),
    ):
        losses.sum().backward()
    with pytest.raises(AssertionError, match="went through the dispatcher"):
        cross_entropy(x.as_subclass(type("Subclass", (Tensor,), {})), y)


@pytest.mark.usefixtures("no_dispatcher")
@pytest.mark.parametrize("name", NAMES)
def test_any_backend_is_asked_in_both_directions_and_records_no_graph(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, calls = backends._kernels["reference"], []

    def noted(operator: str) -> Callable[..., object]:
        def kernel(*args: object) -> object:
            calls.append((operator, torch.is_grad_enabled()))
            return reference[operator](*args)

        return kernel

    noting = {operator: noted(operator) for operator in reference}
    monkeypatch.setattr(backends, "_kernels", {**backends._kernels, "noting": noting})
    x = torch.randn(B, C, requires_grad=True)
    with backends.use_backend("noting"):
        LOSSES[name](x).sum().backward()
    operator = name.removeprefix("soft ")
    backward = operator.removeprefix("select_") + "_backward"
    assert calls == [(operator, False), (backward, False)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_may_be_batched(backend: str, name: str) -> None:
    x, upstream = torch.randn(B, C, requires_grad=True), torch.randn(3, B)
    losses = LOSSES[name](x)

    def one(g: Tensor) -> Tensor:
        return torch.autograd.grad(losses, x, g, retain_graph=True)[0]

    expected = torch.stack([one(g) for g in upstream])
    (batched,) = torch.autograd.grad(losses, x, upstream, retain_graph=True, is_grads_batched=True)
    assert torch.equal(batched, expected)
    assert torch.equal(torch.func.vmap(one)(upstream), expected)


@pytest.mark.parametrize("name", NAMES)
def test_constants_may_meet_a_forward_mode_derivative(backend: str, name: str) -> None:
    def product(t: Tensor) -> Tensor:
        return t.sum() * LOSSES[name](torch.ones(B, C))

    x = torch.randn(B, C)
    _, tangent = torch.func.jvp(product, (x,), (torch.ones(B, C),))
    assert torch.allclose(tangent, B * C * LOSSES[name](torch.ones(B, C)))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_transform_leaves_behind_has_its_gradient(backend: str, name: str) -> None:
    x, scale, left = torch.randn(B, C), torch.randn(B, C, requires_grad=True), []

    def keep(x: Tensor) -> Tensor:
        left.append(x * scale)
        return left[0].sum()

    torch.func.grad(keep)(x)
    found = torch.autograd.grad(LOSSES[name](left[0]).sum(), scale)
    expected = torch.autograd.grad(LOSSES[name](x * scale).sum(), scale)
    assert same_bits(*found, *expected)


@pytest.mark.parametrize("name", NAMES)
def test_losses_may_be_modified_in_place(backend: str, name: str) -> None:
    x, factor = torch.randn(B, C, requires_grad=True), torch.rand(B)
    (found,) = torch.autograd.grad(LOSSES[name](x).mul_(factor).sum(), x)
    (expected,) = torch.autograd.grad((LOSSES[name](x) * factor).sum(), x)
    assert same_bits(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_losses_have_the_eager_gradient(backend: str, name: str) -> None:
    x = torch.randn(B, C)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    assert same_bits(gradient(compiled, x, torch.ones(B)), gradient(LOSSES[name], x, torch.ones(B)))


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_pass_may_be_compiled(backend: str, name: str) -> None:
    x = torch.randn(B, C, requires_grad=True)
    losses = LOSSES[name](x).sum()
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(fullgraph=True, backend="aot_eager")
    ):
        losses.backward()
    assert x.grad is not None
    assert same_bits(x.grad, gradient(LOSSES[name], x, torch.ones(B)))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_what_is_saved(backend: str, name: str) -> None:
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    x = torch.randn(B, C, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = LOSSES[name](x)
    assert (B, C) in packed
    assert ((B, 3) in packed) == ("cross_entropy" in name and "binary" not in name)
    (result,) = torch.autograd.grad(losses.sum(), x)
    assert same_bits(result, gradient(LOSSES[name], x, torch.ones(B)))


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_wants_no_gradient(backend: str, name: str) -> None:
    x = torch.randn(B, C, requires_grad=True)
    with torch.inference_mode():
        losses = LOSSES[name](x)
    assert losses.is_inference()
    assert not losses.requires_grad
    assert same_bits(losses, LOSSES[name](x))


def test_arguments_are_checked_where_a_gradient_is_wanted(backend: str) -> None:
    x, y = torch.zeros(3, C, requires_grad=True), torch.tensor([0, 1, 9])
    with raises_bad_class(backend, "target holds class 9"):
        cross_entropy(x, y)
    with raises_bad_class(backend, "target holds class 9"):
        select_cross_entropy(x, y, 1)
    with pytest.raises(ValueError, match=r"label_smoothing .*got 2"):
        cross_entropy(x, y, label_smoothing=2)
    with pytest.raises(ValueError, match="weight must not require grad"):
        cross_entropy(x, y, weight=torch.ones(C, requires_grad=True))
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        cross_entropy(x, y, weight=[1.0] * C)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target must not require grad"):
        cross_entropy(x, torch.rand(3, C, requires_grad=True))
    with pytest.raises(ValueError, match="k must be in"):
        select_cross_entropy(x, y, 4)
    with pytest.raises(ValueError, match="target must not require grad"):
        mse(x, torch.rand(3, C, requires_grad=True))


def copied_by(
    backward: bool, logits: Tensor, target: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, ...]]:
    """Shapes of what is made contiguous by the losses of logits, and by their gradient."""
    copies = []
    contiguous = Tensor.contiguous

    def spy(x: Tensor) -> Tensor:
        if not x.is_contiguous():
            copies.append(tuple(x.shape))
        # The mode that places the tests' tensors calls what has the method's name now: this again.
        with torch._C.DisableTorchFunction():
            return contiguous(x)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", spy)
        losses = cross_entropy(logits.requires_grad_(backward), target)
        if backward:
            losses.sum().backward()
    return copies


@pytest.mark.parametrize("backward", [False, True])
def test_pixels_are_not_copied(
    backend: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        pytest.skip("the reference has one way to add up, and copies for it")
    target = torch.randint(7, (3, 4, 5))
    x = torch.randn(3, 7, 4, 5)
    assert copied_by(backward, x.movedim(1, -1), target, monkeypatch) == []


def test_logits_with_classes_and_rows_apart_are_copied_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward pass, and not in the backward pass again."""
    target = torch.randint(7, (3, 4, 5))
    x = torch.randn(3, 7, 4, 10)[..., ::2].movedim(1, -1)
    assert copied_by(True, x, target, monkeypatch) == [(3, 4, 5, 7)]
