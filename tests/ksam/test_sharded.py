"""Models of DTensors: ranks that hold half of every weight take the steps of ranks that hold all.

FSDP2 (``fully_shard``) is held against DistributedDataParallel, which test_data_parallel.py holds
against plain torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ksam
from ksam import KSAM, AutoKSAM, From, SharpnessAware, composed
from ksam.distributed import mean_over_ranks
from tests import ranks
from tests.helpers import all_same_bits
from tests.ksam.models import (
    NAMES,
    THRESHOLD,
    Batch,
    batch,
    build,
    fails_in_call,
    loss_of,
    losses,
    network,
)

pytestmark = ranks.needs_ranks

Make = Callable[[nn.Module], SharpnessAware]


def data_of(rank: int, step: int) -> Batch:
    data = batch(4 * step + rank, dtype=torch.float64)
    return {**data, "index": torch.arange(24) + 24 * (step % 2)}


def sharded(model: nn.Sequential) -> nn.Module:
    """The first layer for itself, the others with the outermost module; of four ranks two hold the
    same half."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    count = torch.distributed.get_world_size()
    names = ("copies", "halves")
    mesh = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=names)
    mesh = mesh["halves"] if count == 2 else mesh
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> list[Tensor]:
    return ranks.put_together(model.parameters())


def check_same(found: nn.Module, expected: nn.Module) -> None:
    for p, q in zip(whole(found), whole(expected), strict=True):
        # The norm that ranks tell each other is float32.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def with_base(base: type[torch.optim.Optimizer], **options: Any) -> Make:
    return lambda model: KSAM(model.parameters(), base, model=model, rho=0.1, k=8, **options)


def auto(model: nn.Module) -> SharpnessAware:
    return AutoKSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, k=8, model=model, every=1,
        threshold=THRESHOLD, budget=None,
    )  # fmt: skip


SGD = torch.optim.SGD
MAKERS: dict[str, Make] = {
    **{name: lambda model, name=name: build(name, model) for name in NAMES},
    "AutoKSAM": auto,
    "dampening": with_base(SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "AdamW": with_base(torch.optim.AdamW, lr=0.01),
    "a base with a step of its own": with_base(torch.optim.RMSprop, lr=0.01),
    "micro-batches": with_base(SGD, lr=0.1, momentum=0.9, micro_batch_size=5),
    "adaptive": with_base(SGD, lr=0.1, momentum=0.9, adaptive=True, eta=0.1),
}


def check_steps(rank: int, make: Make) -> None:
    net = network(dtype=torch.float64)
    everywhere = DistributedDataParallel(copy.deepcopy(net))
    half = sharded(net)
    plain, optimizer = make(everywhere), make(half)
    for step in range(5):
        data = data_of(rank, step)
        with torch.no_grad():  # leaves the outermost module's weights gathered
            half(data["x"])
        expected = plain.step(losses(everywhere), data)
        result = optimizer.step(losses(half), data)
        torch.testing.assert_close(result.losses, expected.losses, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(result.grad_norm, expected.grad_norm, rtol=1e-5, atol=1e-7)
        assert torch.equal(result.indices, expected.indices)
        assert result.sharp == expected.sharp
    check_same(half, everywhere)


class Bomb(nn.Module):
    """Goes off in its last forward or backward pass, once ``left`` is set."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.left = where, 0

    def burn(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("boom")

    def forward(self, x: Tensor) -> Tensor:
        self.burn("forward")
        found: Tensor = _Backward.apply(x, self)
        return found


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bomb: Bomb) -> Tensor:  # type: ignore[override]
        ctx.bomb = bomb
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        ctx.bomb.burn("backward")
        return gradient, None


def check_failure(rank: int, where: str, n: int) -> None:
    """On all ranks: the weights are what they were, and the next steps and passes are right."""
    bomb = Bomb(where)
    layers = [network(dtype=torch.float64) for _ in range(2)]
    twin = sharded(nn.Sequential(*layers[0], nn.Identity()))
    model = sharded(nn.Sequential(*layers[1][:2], bomb, layers[1][2]))
    other, optimizer = (with_base(SGD, lr=0.1, momentum=0.9)(m) for m in (twin, model))
    for step in range(3):
        data = data_of(rank, step)
        if step == 1:
            before = [p.to_local().clone() for p in model.parameters()]
            loss, bomb.left = loss_of(model), n
            if where == "after the forward":
                loss = fails_in_call(model, n, RuntimeError("boom"))
            with pytest.raises(RuntimeError, match="boom"):
                optimizer.step(loss, data)
            for p, q in zip(model.parameters(), before, strict=True):
                assert torch.equal(p.to_local(), q)
            with torch.no_grad():
                assert torch.equal(model(data["x"]), twin(data["x"]))
        optimizer.step(loss_of(model), data)
        other.step(loss_of(twin), data)
    assert all_same_bits(whole(model), whole(twin))


def check_averages_that_are_left_out(rank: int) -> None:
    """FSDP2 then keeps gradients where nobody can climb along them, now or in a later call."""
    for name in ("set_requires_gradient_sync", "set_requires_all_reduce"):
        for when in (None, From(1)):
            model = sharded(network())
            optimizer = with_base(SGD, lr=0.1, when=when)(model)
            getattr(model, name)(False)
            with pytest.raises(RuntimeError, match=rf"got {name}\(False\)"):
                optimizer.backward(loss_of(model), data_of(rank, 0))


def check_two_calls(rank: int, make: Make) -> None:
    """The gradients of two calls add up, and no weights stay gathered that have moved since."""
    net = network(dtype=torch.float64)
    everywhere = DistributedDataParallel(copy.deepcopy(net))
    half = sharded(net)
    pairs = [(model, make(model)) for model in (everywhere, half)]
    for step in range(3):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            for call in (2 * step, 2 * step + 1):
                if model is half:
                    half.set_reshard_after_backward(call % 2 == 1)
                optimizer.backward(losses(model), data_of(rank, call), weight=0.5)
            with torch.no_grad():
                model(data_of(rank, 9)["x"])
            optimizer.step()
    check_same(half, everywhere)


def check_checkpoint(rank: int) -> None:
    """A rank's own state_dict resumes its run with the same bits."""
    model, twin = (sharded(network(dtype=torch.float64)) for _ in range(2))
    optimizer, other = (with_base(torch.optim.AdamW, lr=0.01)(m) for m in (model, twin))
    for step in range(2):
        optimizer.step(loss_of(model), data_of(rank, step))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.steps_done == 2
    for m, o in ((model, optimizer), (twin, other)):
        o.step(loss_of(m), data_of(rank, 2))
    assert all_same_bits(whole(model), whole(twin))


def check_scaler(rank: int) -> None:
    """A power of two changes no bit; an overflow on one rank skips the step on both."""
    model, twin = (sharded(network()) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = with_base(SGD, lr=0.1, momentum=0.9)(twin)
    optimizer = with_base(SGD, lr=0.1, momentum=0.9, grad_scaler=scaler)(model)
    for step in range(2):
        data = batch(4 * step + rank)
        plain.step(loss_of(twin), data)
        optimizer.step(loss_of(model), data)
        scaler.update()
    assert all_same_bits(whole(model), whole(twin))
    gradients = 0

    def overflow(p: Tensor) -> None:
        """Makes the descent's gradient overflow, in the part of one rank."""
        nonlocal gradients
        gradients += 1
        if gradients == 2 and rank == 0:
            p.grad.to_local()[0] = float("inf")  # type: ignore[union-attr]

    next(model.parameters()).register_post_accumulate_grad_hook(overflow)
    optimizer.step(loss_of(model), batch(8 + rank))
    scaler.update()
    assert gradients == 2
    assert scaler.get_scale() == 512.0
    assert all_same_bits(whole(model), whole(twin))


def check_diagnostics(rank: int) -> None:
    model, data = sharded(network()), batch(rank)
    optimizer = with_base(SGD, lr=0.1)(model)
    with pytest.raises(NotImplementedError, match="alignment needs whole parameters"):
        ksam.alignment(optimizer, loss_of(model), data, 8)
    with pytest.raises(NotImplementedError, match="measure_alignment=True needs whole parameters"):
        ksam.Diagnostics(optimizer)
    ksam.Diagnostics(optimizer, measure_alignment=False)
    with pytest.raises(NotImplementedError, match="sharpness needs whole parameters"):
        ksam.sharpness(model, loss_of(model), [data])


def check_without_the_model(rank: int) -> None:
    model = sharded(network())
    needs_model = "model must be given when parameters are DTensors .* got None"
    with pytest.raises(ValueError, match=needs_model):
        KSAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match=needs_model):
        KSAM(model.named_parameters(), SGD, lr=0.1)
    optimizer = KSAM(network().named_parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match=needs_model):
        optimizer.add_param_group({"params": list(model.named_parameters("more"))})


def as_if_alone() -> Any:
    """A policy's step within is one of a process that is alone, with a model of its own."""
    return mock.patch.object(composed, "has_ranks", return_value=False)


def check_tensor_parallel(rank: int) -> None:
    """Both ranks see the same samples, and have half of the network's width."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for name in ("KSAM", "ASAM", "ESAM", "MSAM", "AutoKSAM", "AdamW", "micro-batches"):
        alone = network(dtype=torch.float64)
        model = parallelize_module(copy.deepcopy(alone), mesh, plan)
        plain, optimizer = MAKERS[name](alone), MAKERS[name](model)
        for step in range(5):
            data = data_of(0, step)
            with as_if_alone():
                expected = plain.step(losses(alone), data)
            result = optimizer.step(losses(model), data)
            torch.testing.assert_close(result.grad_norm, expected.grad_norm, rtol=1e-5, atol=1e-7)
            assert torch.equal(result.indices, expected.indices)
        check_same(model, alone)


def check_logits_in_parts(rank: int) -> None:
    """Both ranks see the same samples, and each has the logits of half of the classes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    in_parts = RowwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    plan = {"0": ColwiseParallel(), "2": in_parts}
    for name in ("SAM", "KSAM", "AutoKSAM"):
        alone = network(dtype=torch.float64)
        model = parallelize_module(copy.deepcopy(alone), mesh, plan)

        def loss(b: Batch, of: nn.Module) -> Tensor:
            return nn.functional.cross_entropy(of(b["x"]), b["y"], reduction="none")

        make = MAKERS[name]
        plain, optimizer = make(alone), make(model)
        for step in range(3):
            data = data_of(0, step)
            with as_if_alone():
                expected = plain.step(lambda b, of=alone: loss(b, of), data)
            with loss_parallel():
                result = optimizer.step(lambda b, of=model: loss(b, of), data)
            assert type(result.losses) is Tensor
            torch.testing.assert_close(result.losses, expected.losses)
            assert torch.equal(result.indices, expected.indices)
        check_same(model, alone)
    with pytest.raises(TypeError, match=r"logits must not be a DTensor.*logits\.full_tensor\(\)"):
        optimizer.step(lambda b: ksam.cross_entropy(model(b["x"]), b["y"]), data)


def check_all(rank: int) -> None:
    from torch.distributed.fsdp import FSDPModule

    for make in MAKERS.values():
        check_steps(rank, make)
    for n in (1, 2, 3):
        check_failure(rank, "after the forward", n)
        if hasattr(FSDPModule, "reset_iter_state"):  # PyTorch 2.13
            check_failure(rank, "forward", n)
    if hasattr(FSDPModule, "reset_iter_state"):
        for n in (1, 2):
            check_failure(rank, "backward", n)
    for name in ("KSAM", "MSAM", "AdamW", "a base with a step of its own"):
        check_two_calls(rank, MAKERS[name])
    check_averages_that_are_left_out(rank)
    check_checkpoint(rank)
    check_scaler(rank)
    check_diagnostics(rank)
    check_without_the_model(rank)
    check_tensor_parallel(rank)
    check_logits_in_parts(rank)


def test_steps_by_parts_of_weights_are_those_of_whole_weights(tmp_path: Path) -> None:
    ranks.run(check_all, 2, tmp_path)


def check_decisions(rank: int) -> None:
    """By the mean over all four ranks, not over those with the same or with the other half: these
    would call the model in other numbers than the rest, and wait for them for ever."""
    model = sharded(network(dtype=torch.float64))
    of_ranks = mean_over_ranks(torch.tensor(float(rank)), model, list(model.parameters()))
    assert float(of_ranks) == 1.5  # before any waits
    optimizer = AutoKSAM(
        model.parameters(), SGD, lr=0.1, momentum=0.9, k=8, model=model, every=1, threshold=0.78,
        budget=None,
    )  # fmt: skip
    plan = ((0, 2), (0, 1), (0, 1, 2), (1, 3), (0, 1, 2, 3), ())
    sharp = []
    for step, high in enumerate(plan):
        weight = torch.ones(24)
        if rank in high:  # 8 samples have all of the loss; else 0.3 to 0.5 of it
            weight[8:] = 0
        data = {**data_of(rank, step), "weight": weight}
        sharp.append(optimizer.step(lambda b: losses(model)(b) * b["weight"], data).sharp)
    assert sharp == [False, *(len(high) > 2 for high in plan[:-1])]


def check_hybrid(rank: int) -> None:
    check_decisions(rank)
    for name in ("KSAM", "ASAM", "MSAM", "AutoKSAM", "AdamW"):
        check_steps(rank, MAKERS[name])


def test_so_are_those_of_hybrid_sharding(tmp_path: Path) -> None:
    ranks.run(check_hybrid, 4, tmp_path)


def test_parameters_that_do_not_tell_that_they_are_parts_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    model = nn.Sequential(wrapped, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must not be a FullyShardedDataParallel"):
        KSAM(model.parameters(), SGD, lr=0.1, model=model)
