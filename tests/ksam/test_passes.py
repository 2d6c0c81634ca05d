"""Passes: under autocast and checkpointing as without them, what they draw, and what they keep."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import ksam
from ksam import KSAM, SAM, cross_entropy
from ksam.arguments import STATISTICS
from tests.device import DEVICE
from tests.helpers import all_same_bits, default_dtype
from tests.ksam.models import (
    NAMES,
    Batch,
    batch,
    build,
    data_of,
    fails_in_call,
    loss_of,
    losses,
    network,
    weights,
)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


#: Of passes at once, and by micro-batches where the method can.
NAMES_AND_SIZES = [(name, size) for name in NAMES for size in (None, 5)]
NAMES_AND_SIZES.remove(("OrderedSGD", 5))


@pytest.mark.parametrize(("name", "size"), NAMES_AND_SIZES)
def test_autocast_around_the_step_is_autocast_in_the_function(
    backend: str, name: str, size: int | None
) -> None:
    """Autocast keeps its copies of the weights until its outermost block ends."""

    def run(outside: bool) -> list[Tensor]:
        model = network()
        options = {} if name == "OrderedSGD" else {"rho": 0.5}
        optimizer = build(name, model, micro_batch_size=size, **options)

        def inside(b: Batch) -> Tensor:
            with autocast():
                return losses(model)(b)

        grads = []
        for step in range(3):
            data = {**data_of(step), "x": data_of(step)["x"].float()}
            if outside:
                with autocast():
                    optimizer.step(losses(model), data)
            else:
                optimizer.step(inside, data)
            grads += [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        return [*grads, *weights(model)]

    assert all_same_bits(run(outside=True), run(outside=False))


@pytest.mark.parametrize(("name", "size"), NAMES_AND_SIZES)
def test_parametrized_weights_are_computed_anew_in_every_pass(
    backend: str, name: str, size: int | None
) -> None:
    """``parametrize.cached()`` keeps them until its outermost block ends."""
    model = network(dtype=torch.float64)
    weight_norm(model[0])
    twin = copy.deepcopy(model)
    optimizer, other = (build(name, m, micro_batch_size=size) for m in (model, twin))
    for step in range(3):
        with parametrize.cached():
            optimizer.step(losses(model), data_of(step))
        other.step(losses(twin), data_of(step))
    assert all_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("failing", [None, 3])
def test_no_perturbed_weights_are_left_in_autocast(backend: str, failing: int | None) -> None:
    """Whether the step ends or breaks off in the descent; its learning rate is 0."""
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=5.0)
    with autocast():
        expected = loss_of(model)(batch())
    with autocast():
        if failing is None:
            optimizer.step(loss_of(model), batch())
        else:
            with pytest.raises(RuntimeError, match="boom"):
                optimizer.step(fails_in_call(model, failing, RuntimeError("boom")), batch())
        assert torch.equal(loss_of(model)(batch()), expected)


def test_no_weights_are_left_in_autocast_from_before_the_second_call(backend: str) -> None:
    """Those that a pass between backward() and step() has cast."""
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.5)
    with autocast():
        optimizer.backward(loss_of(model), batch())
        before = loss_of(model)(batch())
        optimizer.step()
        found = loss_of(model)(batch())
    with autocast():
        assert torch.equal(found, loss_of(model)(batch()))
    assert not torch.equal(found, before)


def test_diagnostics_in_autocast_see_the_weights_as_they_are(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.5)

    def inside(b: Batch) -> Tensor:
        with autocast():
            return loss_of(model)(b)

    before = inside(batch())

    def measure(function: Callable[[Any], Tensor]) -> tuple[float, ...]:
        cosine = float(ksam.alignment(optimizer, function, batch(), 8))
        return cosine, *ksam.sharpness(model, function, [batch()], rho=0.5)

    expected = measure(inside)
    with autocast():
        with torch.no_grad():
            loss_of(model)(batch())  # copies without a gradient
        assert measure(loss_of(model)) == expected
        with torch.no_grad():
            assert torch.equal(loss_of(model)(batch()), before)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.body = network(batchnorm=True, dtype=torch.float64)
        self.head = nn.Linear(5, 5).double()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x))
        x = x.clone().requires_grad_()  # without it reentrant checkpointing has no gradient
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("method", [KSAM, SAM])
def test_activation_checkpointing_changes_nothing(
    backend: str, method: type[Any], statistics: str, momentum: float | None, reentrant: bool
) -> None:
    """The forward in the backward pass sees BatchNorm as the first one did."""
    found = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed(how)
        model.body[1].momentum = momentum
        optimizer = method(
            model.parameters(), torch.optim.SGD, lr=0.1, model=model, statistics=statistics
        )
        for step in range(2):
            optimizer.step(loss_of(model), batch(step, dtype=torch.float64))
        grads = [p.grad for p in model.parameters()]
        found.append([*weights(model), *grads, *model.buffers()])
        assert model.body[1].momentum == momentum
    assert all_same_bits(*found)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("method", [KSAM, ksam.ImportanceKSAM, ksam.ESAM, SAM])
def test_what_the_batch_wants_a_gradient_of_has_one_in_every_pass(
    backend: str, method: type[Any], micro_batch_size: int | None
) -> None:
    """A penalty on the derivative by the inputs, with inputs marked by their owner or in the
    function."""
    found = []
    for is_marked in (True, False):
        torch.manual_seed(0)
        model = network()

        def losses(b: Any, model: nn.Module = model) -> Tensor:
            with torch.enable_grad():
                x = b["x"] if b["x"].requires_grad else b["x"].detach().requires_grad_()
                slopes = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)[0]
            return cross_entropy(model(x), b["y"]) + slopes.square().flatten(1).sum(1)

        optimizer = method(
            model.parameters(), torch.optim.SGD, lr=0.1, micro_batch_size=micro_batch_size
        )
        for step in range(2):
            data = batch(step)
            data["x"].requires_grad_(is_marked)
            optimizer.step(losses, data)
        found.append(weights(model))
    assert all_same_bits(*found)


def test_a_parameter_in_the_batch_is_refused_where_rows_of_it_would_be_copies() -> None:
    table = nn.Parameter(torch.randn(8, 3))
    data = {"rows": table, "y": torch.arange(8) % 3}

    def losses(b: Any) -> Tensor:
        return cross_entropy(b["rows"], b["y"])

    with pytest.raises(ValueError, match=r"parameters of the optimizer, got one of shape \(8, 3\)"):
        KSAM([table], torch.optim.SGD, lr=0.1).step(losses, data)
    before = table.detach().clone()
    SAM([table], torch.optim.SGD, lr=0.1).step(losses, data)
    assert (table != before).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["KSAM", "RandomSubsetSAM", "ImportanceKSAM"])
def test_the_default_dtype_does_not_change_what_is_drawn(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    def run(inside: torch.dtype) -> list[Tensor]:
        model = network(dtype=torch.float64)
        optimizer = build(name, model)
        # So many samples that the highest of numbers with eight bits would be alike.
        batches = [batch(step, 512, torch.float64) for step in range(3)]
        with default_dtype(inside):
            chosen = [optimizer.step(losses(model), data).indices for data in batches]
        return [*weights(model), *chosen]

    assert all_same_bits(run(dtype), run(torch.float32))


@pytest.mark.parametrize("name", ["KSAM", "ImportanceKSAM"])
def test_what_is_drawn_is_on_the_device_of_the_losses(name: str) -> None:
    """The batch is on another, on which this function has no use for the tensor's values."""
    model = network(dtype=torch.float64)
    optimizer = build(name, model)

    def function(b: Batch) -> Tensor:
        data = data_of(0)
        rows = len(b["x"])
        return losses(model)({"x": data["x"][:rows], "y": data["y"][:rows]})

    result = optimizer.step(function, {"x": torch.empty(24, 8, device="meta")})
    assert result.indices.device == result.losses.device == model[0].weight.device
    assert len(result.indices) == 8


@dataclasses.dataclass
class Output:
    logits: Tensor
    names: list[str]


@pytest.mark.parametrize("when", [None, lambda step: False], ids=["sharp", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_aux_has_no_graph_whatever_the_step(
    backend: str, name: str, when: Callable[[int], bool] | None
) -> None:
    model = network(dtype=torch.float64)
    optimizer = build(name, model, when=when)
    thing, made = object(), []

    def function(b: Batch) -> tuple[Tensor, Any]:
        logits = model(b["x"])
        made.append(logits.detach())
        scalar, parameter = logits.sum(), model[0].weight
        output = Output(logits, ["a"])
        found = {"tree": [output, (scalar, {"deep": parameter})], "thing": thing, "count": 3}
        return losses(lambda _: logits)(b), found

    aux = optimizer.step(function, data_of(0)).aux
    output, (scalar, deep) = aux["tree"]
    tensors = [output.logits, scalar, deep["deep"]]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert any(torch.equal(output.logits, logits) for logits in made)
    assert torch.equal(scalar, output.logits.sum())
    assert output.names == ["a"]
    assert aux["thing"] is thing
    assert aux["count"] == 3
    assert model[0].weight.requires_grad


LOSSES_OF_WRONG_SHAPE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean": (
        lambda losses: losses.mean(),
        r"\(\); do not average or sum over the samples: use reduction='none'",
    ),
    "per token": (
        lambda losses: losses[:, None].expand(-1, 5),
        r"\(24, 5\); if these are losses and not the model's output, average over the other "
        r"dimensions: losses\.flatten\(1\)\.mean\(1\)",
    ),
    "of another batch": (
        lambda losses: losses[:-1],
        r"\(23,\); compute them from the function's argument, which may be a part of the batch, "
        r"with the samples in dimension 0 of every tensor",
    ),
}


@pytest.mark.parametrize("name", LOSSES_OF_WRONG_SHAPE)
def test_losses_that_are_not_one_per_sample_raise_with_advice(name: str) -> None:
    wrong, message = LOSSES_OF_WRONG_SHAPE[name]
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=rf"one loss per sample, shape \(24,\), got {message}$"):
        optimizer.step(lambda b: wrong(loss_of(model)(b)), batch())
