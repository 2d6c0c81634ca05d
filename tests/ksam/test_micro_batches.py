"""Steps by micro-batches: the same steps, with the activations of one of them at a time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import ksam
from ksam import KSAM, SAM, AutoKSAM, OrderedSGD
from ksam.micro_batches import split
from ksam.parts import Subset
from tests.device import DEVICE
from tests.helpers import all_same_bits
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
    scaler,
    weights,
)

BY_MICRO_BATCHES = [name for name in NAMES if name != "OrderedSGD"]


def recorded(function: Callable[[Batch], Any]) -> tuple[Callable[[Batch], Any], list[int]]:
    """The function, and the sizes of the batches that it is called with."""
    sizes: list[int] = []

    def spy(b: Batch) -> Any:
        sizes.append(len(b["x"]))
        return function(b)

    return spy, sizes


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 24])
@pytest.mark.parametrize("size", [None, 1, 2, 7, 8, 9, 24, 100])
def test_parts_are_few_and_alike(samples: int, size: int | None) -> None:
    indices, weights = torch.arange(samples) + 3, torch.rand(samples)
    x, scalar, names = torch.rand(samples, 2), torch.tensor(1.0), ["a", "b"]
    subset = Subset({"x": x, "more": (scalar, names)}, samples, indices, weights)
    parts = split(subset, size)
    sizes = [part.samples for part in parts]
    assert len(parts) == (1 if size is None else -(-samples // size))
    assert max(sizes) <= (samples if size is None else size)
    assert max(sizes) - min(sizes) <= 1
    for name in ("indices", "weights"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(subset, name))
    assert torch.equal(torch.cat([part.batch["x"] for part in parts]), x)
    for part in parts:
        assert part.batch["x"].data_ptr() == x[part.indices[0] - 3 :].data_ptr()
        assert part.batch["more"] == (scalar, names)


@pytest.mark.parametrize("size", [1, 5, 8, 23, 24, 100])
@pytest.mark.parametrize("name", BY_MICRO_BATCHES)
def test_steps_are_those_of_whole_batches(backend: str, name: str, size: int) -> None:
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    whole, optimizer = build(name, model), build(name, twin, micro_batch_size=size)
    for step in range(4):
        expected = whole.step(losses(model), data_of(step))
        function, sizes = recorded(losses(twin))
        result = optimizer.step(function, data_of(step))
        assert max(sizes) <= size
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
        assert torch.equal(result.indices, expected.indices)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", ["mean", "batch", "share"])
def test_the_scale_is_that_of_the_selection(backend: str, scale: str) -> None:
    """The share is one of gradient bounds over the whole batch, whose logits come in parts."""
    model, twin = network(dtype=torch.float64), network(dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.1, "k": 8, "scale": scale}
    whole = KSAM(model.parameters(), torch.optim.SGD, **options)
    optimizer = KSAM(twin.parameters(), torch.optim.SGD, micro_batch_size=5, **options)
    whole.report_share = optimizer.report_share = True
    for step in range(3):
        expected = whole.step(loss_of(model), batch(step, dtype=torch.float64))
        result = optimizer.step(loss_of(twin), batch(step, dtype=torch.float64))
        torch.testing.assert_close(result.share, expected.share, rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # the share is float32


def test_the_policy_decides_as_with_whole_batches(backend: str) -> None:
    found = []
    for size in (None, 5):
        model = network(dtype=torch.float64)
        optimizer = AutoKSAM(
            model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, k=8, every=1,
            threshold=0.36, budget=None, statistics="subset", micro_batch_size=size,
        )  # fmt: skip
        data = [batch(step, dtype=torch.float64) for step in range(12)]
        found.append([optimizer.step(loss_of(model), b).sharp for b in data])
    assert found[0] == found[1]
    assert set(found[0]) == {True, False}


@pytest.mark.parametrize("name", BY_MICRO_BATCHES)
def test_a_batch_that_fits_is_taken_at_once(backend: str, name: str) -> None:
    model, twin = network(), network()
    whole, optimizer = build(name, model), build(name, twin, micro_batch_size=24)
    for step in range(3):
        data = {**data_of(step), "x": data_of(step)["x"].float()}
        whole.step(losses(model), data)
        optimizer.step(losses(twin), data)
    assert all_same_bits(weights(model), weights(twin))


class Held:
    """A tensor that a graph keeps; ``now`` counts their rows."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.rows = len(tensor) if tensor.dim() == 2 and tensor.shape[1] == 97 else 0
        Held.now += self.rows
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.rows


@pytest.mark.parametrize("method", [KSAM, SAM])
@pytest.mark.parametrize("size", [4, 8, None])
def test_activations_of_one_micro_batch_are_kept(method: type[Any], size: int | None) -> None:
    model = nn.Sequential(nn.Linear(8, 97), nn.Tanh(), nn.Linear(97, 5))
    options = {"k": 12} if method is KSAM else {}
    optimizer = method(
        model.parameters(), torch.optim.SGD, lr=0.1, micro_batch_size=size, **options
    )
    Held.now = Held.most = 0
    with saved_tensors_hooks(Held, lambda held: held.tensor):
        for step in range(2):
            optimizer.step(loss_of(model), batch(step))
    assert Held.now == 0
    of_a_pass = {KSAM: 12, SAM: 24}[method] if size is None else size
    # The second layer's input and tanh's result, the same tensor saved twice.
    assert 0 < Held.most <= 2 * of_a_pass


class InNumpy(torch.autograd.Function):
    """The values in memory of numpy's, of which weak references tell how long it is held."""

    memory: list[weakref.ref[np.ndarray]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        array = x.numpy(force=True).copy()
        InNumpy.memory.append(weakref.ref(array))
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient

    @classmethod
    def alive(cls) -> int:
        return sum(memory() is not None for memory in cls.memory)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="numpy's memory is the CPU's")
@pytest.mark.parametrize("report_share", [False, True])
@pytest.mark.parametrize("name", BY_MICRO_BATCHES)
def test_logits_are_kept_for_no_other_micro_batch(name: str, report_share: bool) -> None:
    model = network()
    optimizer = build(name, model, micro_batch_size=5)
    optimizer.report_share = report_share
    InNumpy.memory.clear()
    alive: list[int] = []

    def function(b: Batch) -> Tensor:
        if InNumpy.alive():
            gc.collect()  # takes a second in a process that has run other tests
        alive.append(InNumpy.alive())
        return ksam.cross_entropy(InNumpy.apply(model(b["x"].float())), b["y"])

    for step in range(2):
        optimizer.step(function, data_of(step))
    assert alive == [0] * len(alive)
    assert len(alive) >= 2 * 5


def test_alignment_keeps_one_micro_batch() -> None:
    model = nn.Sequential(nn.Linear(8, 97), nn.Tanh(), nn.Linear(97, 5))
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, micro_batch_size=8)
    Held.now = Held.most = 0
    with saved_tensors_hooks(Held, lambda held: held.tensor):
        ksam.alignment(optimizer, loss_of(model), batch(), 8)
    gc.collect()
    assert Held.now == 0
    assert 0 < Held.most <= 2 * 8


@pytest.mark.parametrize("method", [KSAM, SAM])
def test_what_the_function_returns_beside_the_losses_is_a_list(
    backend: str, method: type[Any]
) -> None:
    model = network()
    optimizer = method(model.parameters(), torch.optim.SGD, lr=0.1, micro_batch_size=7)

    def function(b: Batch) -> tuple[Tensor, Any]:
        logits = model(b["x"])
        return loss_of(lambda _: logits)(b), {"logits": logits, "rows": len(b["x"])}

    expected = model(batch()["x"]).detach()
    result = optimizer.step(function, batch())
    assert [of_part["rows"] for of_part in result.aux] == [6, 6, 6, 6]
    logits = torch.cat([of_part["logits"] for of_part in result.aux])
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad
    assert optimizer.step(loss_of(model), batch()).aux is None
    assert len(optimizer.step(function, batch(size=5)).aux) == 1  # a list here, too


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["KSAM", "SAM", "MSAM", "RandomSubsetSAM"])
def test_batchnorm_averages_every_micro_batch_once(
    backend: str, name: str, momentum: float | None
) -> None:
    """Those of the pass over the whole batch; its weights are the start's, as the rate is 0."""
    model = network(batchnorm=True, dtype=torch.float64)
    model[1].momentum = momentum
    twin = copy.deepcopy(model)
    optimizer = build(name, model, micro_batch_size=5, rho=0.0, lr=0.0, weight_decay=0.0)
    for step in range(2):
        data = data_of(step)
        for part in split(Subset(data, 24), 5):
            twin(part.batch["x"])
        optimizer.step(losses(model), data)
    assert model[1].num_batches_tracked == 10
    for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", range(1, 10))
def test_a_failed_micro_batch_is_as_if_the_step_had_not_been(backend: str, call: int) -> None:
    model = network(batchnorm=True)
    twin = copy.deepcopy(model)
    optimizer, other = (
        SAM(m.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=m, micro_batch_size=6)
        for m in (model, twin)
    )
    optimizer.step(loss_of(model), batch(0))
    other.step(loss_of(twin), batch(0))
    before = [*weights(model), *(buffer.clone() for buffer in model.buffers())]
    if call < 9:  # there is no ninth
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(fails_in_call(model, call, KeyboardInterrupt()), batch(1))
        assert all_same_bits([*weights(model), *model.buffers()], before)
    else:
        optimizer.step(fails_in_call(model, call, KeyboardInterrupt()), batch(1))
        other.step(loss_of(twin), batch(1))
    optimizer.step(loss_of(model), batch(2))
    other.step(loss_of(twin), batch(2))
    assert all_same_bits([*weights(model), *model.buffers()], [*weights(twin), *twin.buffers()])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_take_micro_batches_of_the_same_size(copied: Callable[[Any], Any]) -> None:
    optimizer = KSAM(network().parameters(), torch.optim.SGD, lr=0.1, micro_batch_size=7)
    assert copied(optimizer).micro_batch_size == 7


def test_a_scaler_scales_every_micro_batch(backend: str) -> None:
    model, twin = network(), network()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "micro_batch_size": 5}
    plain = KSAM(model.parameters(), torch.optim.SGD, **options)
    grad_scaler = scaler()
    scaled = KSAM(twin.parameters(), torch.optim.SGD, grad_scaler=grad_scaler, **options)
    for step in range(3):
        plain.step(loss_of(model), batch(step))
        scaled.step(loss_of(twin), batch(step))
        grad_scaler.update()
    assert all_same_bits(weights(model), weights(twin))


@pytest.mark.parametrize("name", [None, "BatchNorm"])
def test_alignment_by_micro_batches(backend: str, name: str | None) -> None:
    model = network(dtype=torch.float64, batchnorm=name is not None)
    if name is not None:
        model.eval()  # in which a micro-batch is normalized as the batch is
    data = batch(dtype=torch.float64)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    expected = ksam.alignment(optimizer, loss_of(model), data, 8)
    optimizer.micro_batch_size = 5
    function, sizes = recorded(loss_of(model))
    found = ksam.alignment(optimizer, function, data, 8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert sizes == 2 * [4, 5, 5, 5, 5]
    assert float(ksam.alignment(optimizer, function, data, 1)) < 1  # most parts have none of it


REFUSED: list[tuple[type[Any], dict[str, Any], type[Exception], str]] = [
    (KSAM, {"micro_batch_size": 0}, ValueError, "micro_batch_size must be >= 1, got 0"),
    (KSAM, {"micro_batch_size": True}, TypeError, "micro_batch_size must be an int .*True"),
    (KSAM, {"micro_batch_size": 8.0}, TypeError, r"micro_batch_size must be an int .*8\.0"),
    (OrderedSGD, {"micro_batch_size": 8}, ValueError, "micro_batch_size must be None with Ordered"),
    (KSAM, {"micro_batch_size": 8, "statistics": "full"}, ValueError, "statistics must .*'full'"),
    (
        AutoKSAM,
        {"micro_batch_size": 8, "statistics": "matched", "momentum": 0.9},
        ValueError,
        "statistics must .*'matched'",
    ),
]


@pytest.mark.parametrize(("method", "arguments", "error", "message"), REFUSED)
def test_what_cannot_be_done_by_micro_batches_is_refused(
    method: type[Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        method(network().parameters(), torch.optim.SGD, lr=0.1, **arguments)


def test_statistics_of_autoksam_are_those_that_micro_batches_have() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    whole = AutoKSAM(network().parameters(), torch.optim.SGD, **options)
    optimizer = AutoKSAM(network().parameters(), torch.optim.SGD, micro_batch_size=8, **options)
    assert (whole.statistics, optimizer.statistics) == ("matched", "subset")
