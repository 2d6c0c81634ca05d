"""What goes wrong in mid-step loses nothing: weights, statistics and the next step are intact."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ksam.optimizer
from ksam import KSAM, MSAM, SAM, AutoKSAM, Representative, SharpnessAware
from ksam.samplers import TopK
from tests.helpers import all_same_bits
from tests.ksam.models import batch, fails_in_call, loss_of, network, weights


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_failed_step_is_as_if_it_had_not_been(
    backend: str, base: type[torch.optim.Optimizer], error: BaseException, call: int
) -> None:
    model = network(batchnorm=True)
    twin = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), base, lr=0.01, model=model)
    other = KSAM(twin.parameters(), base, lr=0.01, model=twin)
    optimizer.step(loss_of(model), batch(0))
    other.step(loss_of(twin), batch(0))
    with pytest.raises(type(error)):
        optimizer.step(fails_in_call(model, call, error), batch(1))
    assert all_same_bits(weights(model), weights(twin))
    assert all_same_bits(list(model.buffers()), list(twin.buffers()))
    assert model[1].track_running_stats
    optimizer.step(loss_of(model), batch(2))
    other.step(loss_of(twin), batch(2))
    assert all_same_bits(weights(model), weights(twin))
    assert all_same_bits(list(model.buffers()), list(twin.buffers()))


def test_a_base_optimizer_that_raises_leaves_the_weights(backend: str) -> None:
    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            raise RuntimeError("after the update")

    model = network()
    before = weights(model)
    optimizer = KSAM(model.parameters(), Breaks, lr=0.1)
    with pytest.raises(RuntimeError, match="after the update"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where pytest was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("operation", ["perturb_", "restore_sgd_"])
def test_ctrl_c_while_weights_are_written_leaves_whole_weights(
    backend: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt arrives inside the operation, and again just after it."""
    model = network()
    before = weights(model)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    kernels = ksam.optimizer.ksam_kernels
    original = getattr(kernels, operation)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(kernels, operation, interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss_of(model), batch())
    if operation == "perturb_":
        assert all_same_bits(weights(model), before)
        assert optimizer.steps_done == 0
    else:  # the step was complete when the interrupt took effect
        assert not all_same_bits(weights(model), before)
        assert optimizer.steps_done == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_failed_step_is_undone_waits_until_it_is(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    before = weights(model)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    restore = ksam.optimizer.ksam_kernels.restore_

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        restore(*args)

    monkeypatch.setattr(ksam.optimizer.ksam_kernels, "restore_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails_in_call(model, 3, RuntimeError("boom")), batch())
    assert all_same_bits(weights(model), before)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_non_finite_ascent_gradient_leaves_the_step_unperturbed(backend: str, bad: float) -> None:
    model = network(dtype=torch.float64)
    seen: list[list[Tensor]] = []

    def per_sample_loss(b: dict[str, Tensor]) -> Tensor:
        seen.append(weights(model))
        losses = loss_of(model)(b)
        return losses * bad if len(seen) == 1 else losses

    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=1.0)
    result = optimizer.step(per_sample_loss, batch(dtype=torch.float64))
    assert not result.grad_norm.isfinite()
    assert all_same_bits(seen[0], seen[1])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_zero_gradient_moves_nothing(backend: str) -> None:
    model = network()
    before = weights(model)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    result = optimizer.step(lambda b: loss_of(model)(b) * 0, batch())
    assert float(result.grad_norm) == 0
    assert all_same_bits(weights(model), before)


def test_parameters_frozen_unused_empty_and_tied_are_served(backend: str) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    unused, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    tied = nn.Linear(5, 5, bias=False)
    model = nn.Sequential(model, tied, nn.Tanh(), tied)
    model.extra, model.empty = unused, empty
    frozen = model[0][0].weight.clone()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    before = weights(model)
    for step in range(3):
        optimizer.step(loss_of(model), batch(step))
    assert torch.equal(model[0][0].weight, frozen)
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(tied.weight, before[-1])


def test_a_parameter_with_a_gradient_in_one_pass_only(backend: str) -> None:
    model = network()
    late = nn.Parameter(torch.ones(()))
    early = nn.Parameter(torch.ones(()))
    calls: list[int] = []

    def per_sample_loss(b: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return loss_of(model)(b) * (early if len(calls) == 2 else late if len(calls) == 3 else 1)

    params = [*model.parameters(), early, late]
    KSAM(params, torch.optim.SGD, lr=0.1).step(per_sample_loss, batch())
    assert early.item() == 1  # perturbed, then restored, without a gradient to descend
    assert late.item() != 1


def test_a_model_may_change_its_dtype_between_steps(backend: str) -> None:
    """Its parameters and buffers are in other memory then."""
    model = network(batchnorm=True)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(loss_of(model), batch())
    model.double()
    before = [*weights(model), *(b.clone() for b in model.buffers())]
    data = batch(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step(fails_in_call(model, 3, RuntimeError("boom")), data)
    assert all_same_bits([*weights(model), *model.buffers()], before)
    optimizer.step(loss_of(model), data)
    assert not all_same_bits(weights(model), before[:6])


def test_a_parameter_may_change_its_shape_between_steps(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = KSAM([p], torch.optim.SGD, lr=0.1)

    def function(b: dict[str, Tensor]) -> Tensor:
        return b["x"] * p.square().sum()

    optimizer.step(function, {"x": torch.ones(2)})
    p.data, p.grad = torch.ones(5), None
    optimizer.step(function, {"x": torch.ones(2)})
    assert (p < 1).all()


@pytest.mark.parametrize("method", [KSAM, SAM, MSAM, AutoKSAM])
def test_a_model_that_is_frozen_is_told_as_plain_pytorch_tells_it(
    backend: str, method: type[SharpnessAware]
) -> None:
    model = network().requires_grad_(False)
    before = weights(model)
    optimizer = method(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"without a graph.* all parameters frozen"):
        optimizer.step(loss_of(model), batch())
    assert all_same_bits(weights(model), before)


BAD_STEPS: list[tuple[Callable[[Any], Any], Any, type[Exception], str]] = [
    (lambda b: b["x"].mean(), batch(), ValueError, r"per_sample_loss .*\(24,\), got \(\)"),
    (lambda b: b["x"][:3, 0], batch(), ValueError, r"\(24,\), got \(3,\)"),
    (lambda b: b["x"], batch(), ValueError, r"got \(24, .*these are losses and not the model's"),
    (
        lambda b: (b["x"][:, :1] - b["x"][:, 0]).square(),
        batch(),
        ValueError,
        r"got \(24, 24\); did \(24, 1\) and \(24,\) broadcast",
    ),
    (lambda b: b["y"], batch(), TypeError, "losses .* must be float32, .* got torch.int64"),
    (lambda b: 1.0, batch(), TypeError, "losses .* must be a tensor, got float"),
    (lambda b: b["x"][:, 0].to_sparse(), batch(), TypeError, "losses .* got layout .*sparse"),
    (
        lambda b: b["x"][:, 0].to(torch.float8_e5m2),
        batch(),
        TypeError,
        "losses returned by per_sample_loss must be .* got torch.float8_e5m2",
    ),
    (
        lambda b: b["x"][:, 0],
        {"x": torch.ones(4, 2), "y": torch.ones(5)},
        ValueError,
        r"batch\['x'\]: 4, batch\['y'\]: 5",
    ),
    (lambda b: b, {"n": 3}, ValueError, "batch must hold a tensor"),
    (lambda b: b["x"], {"x": torch.ones(0)}, ValueError, "at least one sample, got 0"),
    (lambda b: b["x"][:, 0].detach(), batch(), RuntimeError, "without a graph"),
]


@pytest.mark.parametrize(("function", "data", "error", "message"), BAD_STEPS)
def test_bad_input_is_named_before_anything_changes(
    backend: str, function: Any, data: Any, error: type[Exception], message: str
) -> None:
    model = network(batchnorm=True)
    before = weights(model), [b.clone() for b in model.buffers()]
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    with pytest.raises(error, match=message):
        optimizer.step(function, data)
    assert all_same_bits(weights(model), before[0])
    assert all_same_bits(list(model.buffers()), before[1])
    assert optimizer.steps_done == 0


def test_inference_mode_is_refused_before_anything_is_called(backend: str) -> None:
    model, calls = network(), []
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        optimizer.step(lambda b: (calls.append(b), loss_of(model)(b))[1], batch())
    assert not calls
    with torch.no_grad():
        optimizer.step(loss_of(model), batch())


class Forgets(TopK):
    """Fails to take in what the step found out."""

    def observe(self, passes: Any) -> None:
        raise RuntimeError("observe")


def test_a_step_counts_also_where_a_part_fails_to_learn_from_it(backend: str) -> None:
    model = network()
    before = weights(model)
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1, ascent=Forgets(8))
    with pytest.raises(RuntimeError, match="observe"):
        optimizer.step(loss_of(model), batch())
    assert not all_same_bits(weights(model), before)
    assert optimizer.steps_done == 1


def test_parts_are_told_the_number_of_the_step_that_is_done(backend: str) -> None:
    told: list[int] = []

    class Listens(Representative):
        def observe(self, step: int, cost: float, share: Tensor | None) -> None:
            told.append(step)

    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, when=Listens())
    for step in range(3):
        optimizer.step(loss_of(model), batch(step))
    assert told == [0, 1, 2]
