"""KSAM is a real torch.optim.Optimizer: groups, schedules, checkpoints, copies, BatchNorm."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ksam import KSAM
from ksam.backups import Backups
from ksam.selection import subset_size
from ksam.update import _step_counter
from tests.helpers import all_same_bits, default_dtype, same_bits
from tests.ksam.models import batch, loss_of, network, noting_weights, weights


@pytest.mark.parametrize(
    ("k", "size", "expected"),
    [(1 / 3, 128, 43), (1 / 3, 1, 1), (0.001, 10, 1), (1.0, 7, 7), (5, 3, 3), (1, 3, 1)],
)
def test_k_is_a_fraction_or_a_count(k: float, size: int, expected: int) -> None:
    assert subset_size(k, size) == expected


@pytest.mark.parametrize(
    ("k", "error"),
    [
        *((k, ValueError) for k in (0, -1, 0.0, -0.5, 1.5, float("nan"))),
        *((k, TypeError) for k in (True, "1/3", None)),
    ],
)
def test_k_out_of_range_is_refused(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"k .*{k}"):
        KSAM(network().parameters(), torch.optim.SGD, lr=0.1, k=k)
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=lambda step: k)
    with pytest.raises(error, match=f"k .*{k}"):
        optimizer.step(loss_of(model), batch())


@pytest.mark.parametrize("rho", [-0.1, float("inf"), float("nan")])
def test_rho_out_of_range_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=f"rho .*{rho}"):
        KSAM(network().parameters(), torch.optim.SGD, lr=0.1, rho=rho)
    with pytest.raises(ValueError, match=f"eta .*{rho}"):
        KSAM(network().parameters(), torch.optim.SGD, lr=0.1, eta=rho)


def test_k_and_rho_follow_schedules_that_survive_a_resume(backend: str) -> None:
    model = network()

    def build() -> KSAM:
        return KSAM(
            model.parameters(), torch.optim.SGD, lr=0.1, rho=lambda t: t / 10, k=lambda t: t + 1
        )

    optimizer = build()
    for step in range(3):
        result = optimizer.step(loss_of(model), batch())
        assert len(result.indices) == step + 1
        assert optimizer.param_groups[0]["rho"] == step / 10
    resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    assert len(resumed.step(loss_of(model), batch()).indices) == 4
    assert resumed.param_groups[0]["rho"] == 0.3


def test_rho_is_a_group_option_under_one_global_norm(backend: str) -> None:
    model, data = network(), batch()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0}]
    optimizer = KSAM(groups, torch.optim.SGD, lr=0.1, rho=0.2, k=1.0)
    assert [group["rho"] for group in optimizer.param_groups] == [0.2, 0.0]
    function, seen = noting_weights(model)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model)(data).mean(), params)
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    optimizer.step(function, data)
    torch.testing.assert_close(seen[1][0], seen[0][0] + 0.2 * grads[0] / norm)
    assert all_same_bits(seen[0][2:], seen[1][2:])


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
        (torch.optim.AdamW, {"lr": 0.01}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    backend: str, base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), base, **options)
    for step in range(3):
        optimizer.step(loss_of(model), batch(step))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network()
    twin.load_state_dict(saved["model"])
    resumed = KSAM(twin.parameters(), base, **options)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.state is resumed.base.state
    for step in range(3, 6):
        optimizer.step(loss_of(model), batch(step))
        resumed.step(loss_of(twin), batch(step))
    assert all_same_bits(weights(model), weights(twin))


def test_a_checkpoint_in_mid_step_holds_no_backup(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    sizes: list[int] = []

    def per_sample_loss(b: dict[str, Tensor]) -> Tensor:
        state = optimizer.state_dict()["state"]
        sizes.append(sum(len(entry) for entry in state.values()))
        return loss_of(model)(b)

    optimizer.step(per_sample_loss, batch())
    assert sizes == [0, 0, 0]
    assert {name for entry in optimizer.state.values() for name in entry} == {"momentum_buffer"}


def test_state_of_a_plain_base_optimizer_goes_on(backend: str) -> None:
    """A run that began with torch.optim.SGD keeps its momentum, and goes back with it."""
    model = network(dtype=torch.float64)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    plain = torch.optim.SGD(model.parameters(), **options)
    other = torch.optim.SGD(twin.parameters(), **options)
    optimizer = KSAM(None, other, rho=0.0, k=1.0)
    for step in range(4):
        data = batch(step, dtype=torch.float64)
        plain.zero_grad()
        loss_of(model)(data).mean().backward()
        plain.step()
        if step in (1, 2):
            optimizer.step(loss_of(twin), data)
        else:
            other.zero_grad()
            loss_of(twin)(data).mean().backward()
            other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class Filled(TorchDispatchMode):
    """Counts the tensors that are filled where they are; those copied there are made unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.full.default
        return func(*args, **(kwargs or {}))


def test_step_counters_are_made_on_the_device_of_their_parameter() -> None:
    """Without a copy from the host, for which a GPU would be waited for."""
    param = torch.empty(3, device="meta")
    for value in (0.0, 1.0):
        with Filled() as filled:
            counter = _step_counter(param, value)
        assert (counter.device, counter.dtype, counter.shape) == (param.device, torch.float32, ())
        assert filled.count == 1
    loaded = torch.tensor(7.0, dtype=torch.float64)
    assert _step_counter(param, loaded).device == param.device
    assert same_bits(_step_counter(torch.empty(3), loaded), torch.tensor(7.0))
    kept = torch.tensor(7.0)
    assert _step_counter(torch.empty(3), kept) is kept


def test_copies_are_independent_and_whole(backend: str) -> None:
    model = network(batchnorm=True)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model)
    optimizer.step(loss_of(model), batch())
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert isinstance(clone, KSAM)
        assert clone.param_groups is clone.base.param_groups
        assert clone.state is clone.base.state
        before = weights(model)
        assert clone.model is not None
        clone.step(loss_of(clone.model), batch(1))
        assert all_same_bits(weights(model), before)
        assert clone.steps_done == 2
        assert optimizer.steps_done == 1


def test_learning_rate_schedulers_work_without_warnings(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=1.0, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=20),
        ]
        for scheduler in schedulers:
            optimizer.step(loss_of(model), batch())
            scheduler.step()
        assert optimizer.base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1.0


def test_hooks_on_the_optimizer_and_on_its_base_run(backend: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    ran: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))

    def clip(*_: Any) -> None:
        ran.append("clip")
        nn.utils.clip_grad_norm_(model.parameters(), 1e-6)

    optimizer.base.register_step_pre_hook(clip)
    before = weights(model)
    optimizer.step(loss_of(model), batch(dtype=torch.float64))
    assert ran == ["before", "clip", "after"]
    moved = torch.cat([(p - w).flatten() for p, w in zip(weights(model), before, strict=True)])
    assert 0 < float(moved.norm()) <= 1e-7 * 1.01


def test_groups_can_be_added(backend: str) -> None:
    model, late = network(), nn.Parameter(torch.ones(()))
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    optimizer.step(loss_of(model), batch())
    optimizer.add_param_group({"params": late, "lr": 0.5})
    assert optimizer.base.param_groups[1]["rho"] == 0.3
    optimizer.step(lambda b: loss_of(model)(b) * late, batch())
    assert late.item() != 1
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(late.data)]})
    assert len(optimizer.param_groups) == 2


def test_base_can_be_an_instance_over_the_same_parameters() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert KSAM(None, base).param_groups is base.param_groups
    with pytest.raises(ValueError, match=r"^params must be None or the 4 .*, got 4 .*, 0 of which"):
        KSAM(network().parameters(), base)
    with pytest.raises(TypeError, match=r"^lr must not .*already built, got 0\.1"):
        KSAM(None, base, lr=0.1)
    with pytest.raises(ValueError, match="params must be given"):
        KSAM(None, torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"got LBFGS, whose step\(\) needs a closure"):
        KSAM(model.parameters(), torch.optim.LBFGS)
    with pytest.raises(TypeError, match="base must be"):
        KSAM(model.parameters(), "SGD")  # type: ignore[arg-type]


def test_the_function_may_take_things_out_of_the_batch(backend: str) -> None:
    model = network()
    data = {"inputs": [batch()["x"], "name"], "labels": batch()["y"]}

    def per_sample_loss(b: dict[str, Any]) -> Tensor:
        return loss_of(model)({"x": b["inputs"].pop(0), "y": b.pop("labels")})

    for k in (8, 1.0):
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=k)
        optimizer.step(per_sample_loss, data)
    assert list(data) == ["inputs", "labels"]
    assert len(data["inputs"]) == 2


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("k", [8, 1.0])
def test_batchnorm_statistics_are_those_of_one_pass_over_the_whole_batch(
    backend: str, momentum: float | None, k: float
) -> None:
    model = network(batchnorm=True)
    model[1].momentum = momentum
    twin = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=k, model=model)
    for step in range(3):
        twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
        twin(batch(step)["x"])
        optimizer.step(loss_of(model), batch(step))
        assert all_same_bits(list(model.buffers()), list(twin.buffers()))
    assert int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_step_that_does_not_climb_reports_a_norm_of_the_same_dtype(
    backend: str, dtype: torch.dtype
) -> None:
    model, data = network(), batch()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, when=lambda step: step == 0)
    with default_dtype(dtype):
        norms = [optimizer.step(loss_of(model), data).grad_norm for _ in range(2)]
    assert [norm.dtype for norm in norms] == [torch.float32] * 2


def test_evaluation_mode_is_respected(backend: str) -> None:
    model = network(batchnorm=True).eval()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(loss_of(model), batch())
    assert int(model[1].num_batches_tracked) == 0
    assert not model.training


def test_data_pointers_are_stable(backend: str) -> None:
    model = network()
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(loss_of(model), batch())
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_backups_keep_their_memory_whatever_moves() -> None:
    """Other tensors in every step, as ESAM draws them."""
    a, b = torch.ones(3), torch.ones(4)
    backups = Backups()
    addresses = [
        [backup.data_ptr() for backup in backups.of(moving, lambda: [a, b])]
        for moving in ([a, b], [b], [a], [a, b])
    ]
    first, second = addresses[0]
    assert addresses == [[first, second], [second], [first], [first, second]]
