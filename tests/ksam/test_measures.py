"""Alignment and sharpness: what they measure, and what they leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ksam
from ksam import KSAM
from tests.device import DEVICE
from tests.helpers import all_same_bits, default_dtype
from tests.ksam import plain
from tests.ksam.models import batch, loss_of, network, noting_weights, weights


def test_alignment_is_the_cosine_of_two_gradients(backend: str) -> None:
    model = network(dtype=torch.float64)
    data = batch(dtype=torch.float64)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    found = ksam.alignment(
        optimizer, lambda b: F.cross_entropy(model(b["x"]), b["y"], reduction="none"), data, 8
    )
    top = plain.largest(plain.losses_of(model, data).detach(), 8)
    a, b = (
        torch.cat([g.flatten() for g in plain.gradient(model, part)])
        for part in (data, plain.rows(data, top))
    )
    torch.testing.assert_close(found.double(), F.cosine_similarity(a, b, 0), rtol=1e-5, atol=0)


def _checkpointed(
    begin: int, end: int, reentrant: bool
) -> Callable[[nn.Sequential, Tensor], Tensor]:
    """Layers [begin, end) keep no activations; their input requires a gradient, as PEFT has it."""

    def forward(model: nn.Sequential, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() if begin == 0 else model[:begin](x)
        x = checkpoint(model[begin:end], x, use_reentrant=reentrant)
        logits: Tensor = model[end:](x)
        return logits

    return forward


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(_checkpointed(0, 2, False), id="checkpointed"),
        pytest.param(_checkpointed(0, 2, True), id="reentrant"),
        pytest.param(_checkpointed(0, 3, True), id="reentrant, all layers"),
        pytest.param(_checkpointed(1, 2, True), id="reentrant, above a layer"),
    ],
)
def test_alignment_of_models_that_recompute(
    forward: Callable[[nn.Sequential, Tensor], Tensor],
) -> None:
    model = network(dtype=torch.float64)
    data = batch(dtype=torch.float64)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    expected = float(ksam.alignment(optimizer, loss_of(model), data, 8))
    found = ksam.alignment(
        optimizer, lambda b: ksam.cross_entropy(forward(model, b["x"]), b["y"]), data, 8
    )
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_alignment_of_a_compiled_model() -> None:
    """Whose steps make programs that free what a second backward pass would need."""
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(loss_of(compiled), batch())
    expected = float(ksam.alignment(optimizer, loss_of(model), batch(), 8))
    found = ksam.alignment(optimizer, loss_of(compiled), batch(), 8)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_alignment_of_small_gradients_in_float16(backend: str) -> None:
    """Products of the gradients' elements are less than float16 can hold."""
    model = network()
    with torch.no_grad():
        model[-1].weight *= 0.01
    data, factor = batch(), 2.0**-12
    found = []
    for dtype in (torch.float16, torch.float32):
        half = copy.deepcopy(model).to(dtype)
        optimizer = KSAM(half.parameters(), torch.optim.SGD, lr=0.1)

        def function(b: dict[str, Tensor], net: nn.Module = half, kind: Any = dtype) -> Tensor:
            return ksam.cross_entropy(net(b["x"].to(kind)), b["y"]) * factor

        found.append(float(ksam.alignment(optimizer, function, data, 8)))
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_alignment_draws_alike_in_both_passes(backend: str) -> None:
    """Of all samples it is 1, with dropout too, and what a run draws afterwards is not touched."""
    model = nn.Sequential(network(), nn.Dropout(0.5))
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, micro_batch_size=9)
    state = torch.get_rng_state()
    for k in (24, 1):  # of one sample, most micro-batches have none
        found = float(ksam.alignment(optimizer, loss_of(model), batch(), k))
        assert found == pytest.approx(1, abs=1e-6) if k == 24 else found < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_alignment_leaves_gradients_and_statistics_alone(backend: str) -> None:
    """Those of parameters that the optimizer does not hold, too."""
    model = network(batchnorm=True)
    unused = nn.Parameter(torch.ones(2))
    held = [*list(model.parameters())[:-1], unused]
    optimizer = KSAM(held, torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(loss_of(model), batch())
    grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    before = [b.clone() for b in model.buffers()]
    assert float(ksam.alignment(optimizer, loss_of(model), batch(1), 24)) == pytest.approx(1)
    assert all_same_bits([p.grad for p in model.parameters()], grads)  # type: ignore[misc]
    assert all_same_bits(list(model.buffers()), before)


def test_alignment_needs_no_gradient_mode_and_leaves_frozen_weights_out(backend: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    expected = ksam.alignment(optimizer, loss_of(model), batch(), 8)
    assert 0 < float(expected) < 1
    with torch.no_grad():
        assert torch.equal(ksam.alignment(optimizer, loss_of(model), batch(), 8), expected)


def test_sharpness_against_plain_torch(backend: str) -> None:
    model = network(dtype=torch.float64)
    data = [batch(seed, size, dtype=torch.float64) for seed, size in ((0, 24), (1, 10))]

    def function(b: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(b["x"]), b["y"], reduction="none")

    def mean() -> Tensor:
        return torch.cat([function(b) for b in data]).mean()

    before = weights(model)
    found = ksam.sharpness(model, function, data, rho=0.3, directions=2, seed=4)
    assert all_same_bits(weights(model), before)
    loss = mean()
    assert found.loss == pytest.approx(loss.item())
    params = list(model.parameters())
    g = list(torch.autograd.grad(loss, params))

    def rise(direction: list[Tensor]) -> float:
        shifts = plain.euclidean(direction, 0.3)
        return float(plain.moved_by(model, shifts, lambda: [mean().detach()])[0] - loss.detach())

    assert found.adversarial == pytest.approx(rise(g), rel=1e-6)
    generator = torch.Generator().manual_seed(4)
    with torch.device("cpu"):
        noise = [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(2)]
    rises = [rise([n.to(p) for n, p in zip(ns, params, strict=True)]) for ns in noise]
    assert found.random == pytest.approx(sum(rises) / 2, rel=1e-6)
    assert found.adversarial > found.random


def test_dropout_draws_alike_at_all_weights(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 5))
    found = ksam.sharpness(model, loss_of(model), [batch(seed) for seed in range(2)], rho=0.0)
    assert found.random == found.adversarial == 0
    found = ksam.sharpness(model, loss_of(model), [batch()], rho=0.05)
    assert 0 < abs(found.random) < found.adversarial


def test_sharpness_of_batches_that_come_once(backend: str) -> None:
    model = network()
    data = [batch(seed) for seed in range(2)]
    expected = ksam.sharpness(model, loss_of(model), data, directions=1)
    assert ksam.sharpness(model, loss_of(model), iter(data), directions=1) == expected
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        ksam.sharpness(model, loss_of(model), iter(()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sharpness_is_the_same_under_any_default_dtype_and_device(
    backend: str, dtype: torch.dtype
) -> None:
    model = network()
    data = [batch()]
    expected = ksam.sharpness(model, loss_of(model), data, rho=0.5)
    with default_dtype(dtype):
        assert ksam.sharpness(model, loss_of(model), data, rho=0.5) == expected
    with torch.device("meta"):
        assert ksam.sharpness(model, loss_of(model), data, rho=0.5) == expected


def test_sharpness_in_float16_is_that_of_any_number_of_samples(backend: str) -> None:
    """The gradient of one of many samples' mean would be less than float16 can hold."""
    model = network()
    function = loss_of(model)

    def small(b: dict[str, Tensor]) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            return function(b) * 2.0**-8

    once, often = (ksam.sharpness(model, small, [batch()] * n, directions=1) for n in (1, 300))
    assert once.adversarial > 0
    assert often.adversarial == pytest.approx(once.adversarial, rel=1e-3)


def test_sharpness_moves_no_frozen_weights(backend: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    function, seen = noting_weights(model)
    ksam.sharpness(model, function, [batch()], rho=0.5)
    assert all(all_same_bits(ws[:2], seen[0][:2]) for ws in seen)
    assert not all_same_bits(seen[0][2:], seen[-1][2:])


def test_gradients_from_before_have_no_part_in_sharpness(backend: str) -> None:
    """It leaves none either."""
    model = network()
    expected = ksam.sharpness(model, loss_of(model), [batch()])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    assert ksam.sharpness(model, loss_of(model), [batch()]) == expected
    assert all(p.grad is None for p in model.parameters())


def test_sharpness_is_of_losses_per_sample() -> None:
    model = network()
    for reduction in ("mean", "sum"):

        def function(b: dict[str, Tensor], reduction: str = reduction) -> Tensor:
            return F.cross_entropy(model(b["x"]), b["y"], reduction=reduction)

        with pytest.raises(ValueError, match=r"one loss per sample, shape \(24,\), got \(\)"):
            ksam.sharpness(model, function, [batch()])
    with pytest.raises(TypeError, match="seed must be an int >= 0, got 'x'"):
        ksam.sharpness(model, loss_of(model), [batch()], seed="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_sharpness_gives_the_weights_back_if_the_function_raises(backend: str, call: int) -> None:
    model = network(batchnorm=True)
    before = weights(model), [b.clone() for b in model.buffers()]
    calls = iter(range(1, 9))

    def fails(b: dict[str, Tensor]) -> Tensor:
        if next(calls) == call:
            raise RuntimeError("boom")
        return loss_of(model)(b)

    with pytest.raises(RuntimeError, match="boom"):
        ksam.sharpness(model, fails, [batch()], directions=1)
    assert all_same_bits(weights(model), before[0])
    assert all_same_bits(list(model.buffers()), before[1])
