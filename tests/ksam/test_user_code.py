"""What training scripts do around a step, and PyTorch's optimizers take."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR

import ksam_kernels
from ksam import (
    KSAM,
    MSAM,
    SAM,
    AutoKSAM,
    ByLearningRate,
    OrderedSGD,
    RandomSubsetSAM,
    SharpnessAware,
    cross_entropy,
)
from ksam.arguments import STATISTICS
from ksam.batchnorm import Norms, Snapshot
from tests.helpers import all_same_bits
from tests.ksam.models import (
    NAMES,
    batch,
    build,
    data_of,
    gradients,
    loss_of,
    losses,
    network,
    weights,
)

METHODS: dict[str, Callable[..., Any]] = {
    "KSAM": KSAM, "SAM": SAM, "MSAM": MSAM, "AutoKSAM": AutoKSAM, "OrderedSGD": OrderedSGD
}  # fmt: skip
MOMENTUM = {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_with_a_graph_is_refused(backend: str, method: str) -> None:
    """A selection would be cut off from it, and what made it would never be trained."""
    encoder, head = nn.Linear(8, 8), nn.Linear(8, 5)
    params = [*encoder.parameters(), *head.parameters()]
    optimizer = METHODS[method](params, SGD, **MOMENTUM)
    before = weights(encoder), weights(head)
    data = {"inputs": {"f": encoder(batch()["x"])}, "y": batch()["y"]}
    with pytest.raises(ValueError, match=r"without a graph.* at batch\['inputs'\]\['f'\]"):
        optimizer.step(lambda b: cross_entropy(head(b["inputs"]["f"]), b["y"]), data)
    assert all_same_bits(weights(encoder), before[0])
    assert all_same_bits(weights(head), before[1])


def test_a_batch_that_nothing_can_be_gathered_from_is_refused_in_the_first_step(
    backend: str,
) -> None:
    model, data = network(), batch()
    data = {**data, "x": data["x"].to_sparse()}

    def loss(b: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model(b["x"].to_dense()), b["y"])

    optimizer = AutoKSAM(model.parameters(), SGD, **MOMENTUM)  # selects after ten steps, if at all
    with pytest.raises(TypeError, match=r"batch must hold dense tensors, .* torch.arange\(B\)"):
        optimizer.step(loss, data)
    assert MSAM(model.parameters(), SGD, **MOMENTUM).step(loss, data).loss.isfinite()


def test_a_function_that_takes_a_derivative_is_told_of_the_pass_without_gradients(
    backend: str,
) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(b: dict[str, Tensor]) -> Tensor:
        x = b["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - 1).square().sum(1)

    def loss_with_grad(b: dict[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            return loss(b)

    optimizer = KSAM(model.parameters(), SGD, **MOMENTUM)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"per_sample_loss takes a derivative.*enable_grad"):
        optimizer.step(loss, batch())
    assert all_same_bits(weights(model), before)
    first = optimizer.step(loss_with_grad, batch()).loss
    for _ in range(20):
        last = optimizer.step(loss_with_grad, batch()).loss
    assert last < first


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(("KSAM", {"statistics": name}) for name in STATISTICS),
        *((name, {}) for name in ("SAM", "AutoKSAM", "RandomSubsetSAM")),
    ],
)
def test_lazy_modules_get_their_parameters_in_the_first_step(
    backend: str, method: str, options: dict[str, Any], with_model: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(5))
    optimizer = {**METHODS, "RandomSubsetSAM": RandomSubsetSAM}[method](
        model.parameters(), SGD, model=model if with_model else None, **options, **MOMENTUM
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "every pass of a step updates")
        first = optimizer.step(loss_of(model), batch()).loss
        before = weights(model)
        last = optimizer.step(loss_of(model), batch()).loss
    assert last < first
    assert not all_same_bits(weights(model), before)
    if with_model:  # a pass over some samples that comes before has to make the statistics
        assert model[1].num_batches_tracked == 2 + (method == "RandomSubsetSAM")


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_schedule_may_end_a_rounding_below_zero(backend: str, base: type) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), base, lr=0.1, rho=ByLearningRate(0.1))
    scheduler = LinearLR(optimizer, 0.3, 0.0, 3)
    for _ in range(6):
        optimizer.step(loss_of(model), batch())
        scheduler.step()
    group = optimizer.param_groups[0]
    assert -1e-16 < group["lr"] < 0
    before = weights(model)
    optimizer.step(loss_of(model), batch())
    assert group["rho"] == 0
    for w, b in zip(weights(model), before, strict=True):
        assert (w - b).abs().max() <= torch.finfo(w.dtype).eps * b.abs().max()


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_hyperparameters_may_be_tensors_where_the_base_takes_them(backend: str, base: type) -> None:
    found = []
    for decay in (0.1, torch.tensor(0.1)):
        model = network()
        optimizer = KSAM(model.parameters(), base, lr=0.1, weight_decay=decay)
        for seed in range(3):
            optimizer.step(loss_of(model), batch(seed))
        found.append(weights(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_method_that_climbs_nothing_leaves_no_radius_to_others(backend: str) -> None:
    model = network()
    plain = OrderedSGD(model.parameters(), SGD, **MOMENTUM)
    plain.step(loss_of(model), batch())
    loaded = KSAM(model.parameters(), SGD, rho=0.1, **MOMENTUM)
    loaded.load_state_dict(plain.state_dict())
    for optimizer in (loaded, KSAM(None, plain.base, rho=0.1)):
        seen: list[Tensor] = []

        def loss(b: dict[str, Tensor], seen: list[Tensor] = seen) -> Tensor:
            seen.append(model[0].weight.detach().clone())
            return loss_of(model)(b)

        optimizer.step(loss, batch())
        assert optimizer.param_groups[0]["rho"] == 0.1
        assert not torch.equal(seen[1], seen[2])


def test_a_schedule_stays_with_a_group_whose_parameters_are_replaced(backend: str) -> None:
    """As where a trainer shards a model that an optimizer has been built for."""
    model = network()
    optimizer = KSAM(model.parameters(), SGD, rho=lambda step: 0.01 * (step + 1), **MOMENTUM)
    radii = []
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0]["params"] = [
                nn.Parameter(p.detach().clone()) for p in model.parameters()
            ]
            new = optimizer.param_groups[0]["params"]
            model[0].weight, model[0].bias, model[2].weight, model[2].bias = new
        optimizer.step(loss_of(model), batch(step))
        radii.append(optimizer.param_groups[0]["rho"])
    assert radii == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_batchnorm_is_copied_in_lists_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others torch copies one by one on a GPU."""
    model = nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(5)), nn.BatchNorm1d(8).double())
    before = [b.clone() for b in model.buffers()]
    copy, lists = torch._foreach_copy_, []

    def noted(to: list[Tensor], of: list[Tensor]) -> None:
        lists.append({t.dtype for t in (*to, *of)})
        copy(to, of)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    snapshot = Snapshot()
    for _ in range(2):
        snapshot.take(Norms(model))
    assert sorted(map(str, (dtype for kinds in lists[:3] for dtype in kinds))) == sorted(
        map(str, (torch.float32, torch.int64, torch.float64))
    )
    assert len(lists) == 6
    for b in model.buffers():
        b.add_(1)
    snapshot.put_back()
    assert all_same_bits(list(model.buffers()), before)


def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    np = pytest.importorskip("numpy")
    found = []
    for number in (float, np.float32, np.float64):
        model = network()
        optimizer = KSAM(
            model.parameters(), SGD, lr=number(0.5), momentum=number(0.25), rho=number(0.125)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(2):
                result = optimizer.step(
                    lambda b, model=model, number=number: cross_entropy(
                        model(b["x"]), b["y"], label_smoothing=number(0.25)
                    ),
                    batch(seed),
                )
        assert math.isfinite(result.loss)
        found.append(weights(model))
    assert all_same_bits(found[0], found[1])
    assert all_same_bits(found[0], found[2])


@pytest.mark.parametrize("compiled_model", [False, True])
@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("method", ["KSAM", "SAM"])
@torch._dynamo.config.patch(issue_3_13_0_warning=False)  # of that Python, not of ours
def test_a_step_that_is_compiled_whole_is_the_step_and_warns_of_nothing(
    method: str, two_calls: bool, compiled_model: bool
) -> None:
    """The compiler sees nothing of it, but for what is compiled in it."""
    model, twin = network(), network()
    optimizer, other = (
        METHODS[method](m.parameters(), SGD, model=m, **MOMENTUM) for m in (model, twin)
    )
    torch._dynamo.reset()
    programs = []

    def noted(program: torch.fx.GraphModule, _: object) -> Any:
        programs.append(program)
        return program

    function = loss_of(torch.compile(model, backend=noted) if compiled_model else model)

    @torch.compile(backend=noted)
    def step(data: dict[str, Tensor]) -> Tensor:
        if not two_calls:
            return optimizer.step(function, data).loss
        optimizer.zero_grad()
        loss = optimizer.backward(function, data).loss
        optimizer.step()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            step(batch(number))
            other.step(loss_of(twin), batch(number))
    assert [str(warning.message) for warning in caught] == []
    assert all_same_bits(weights(model), weights(twin))
    assert bool(programs) == compiled_model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("frozen", [1, None], ids=["one-frozen", "all-frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_are_not_those_of_the_function_are_told_of_once(
    method: str, frozen: int | None, compiled: bool
) -> None:
    """Copies of the model's; or those of a model in which adapters alone are trained."""
    model = network()
    others = list(copy.deepcopy(model).parameters())
    for p in others[:frozen]:
        p.requires_grad_(False)
    optimizer = METHODS[method](others, SGD, **MOMENTUM)
    torch._dynamo.reset()

    def step() -> None:
        optimizer.step(loss_of(model), batch())

    run = torch.compile(step, backend="eager") if compiled else step
    before = weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run()
    told = [w for w in caught if "the step trains nothing" in str(w.message)]
    assert [w.filename for w in told] == [__file__]
    assert all_same_bits(weights(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_some_parameters_without_a_gradient_are_no_reason_to_warn(
    backend: str, method: str
) -> None:
    model, unused = network(), nn.Parameter(torch.ones(3))
    optimizer = METHODS[method]([unused, *model.parameters()], SGD, **MOMENTUM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(loss_of(model), batch())


@pytest.mark.parametrize("method", [KSAM, MSAM])
def test_gradients_in_a_buffer_of_the_user_s_are_added_up_there(
    backend: str, method: type[SharpnessAware]
) -> None:
    model, twin = network(), network()
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params))
    views = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params)]  # noqa: B905
    for p, view in zip(params, views, strict=True):
        p.grad = view
    optimizer, other = (method(m.parameters(), SGD, **MOMENTUM) for m in (model, twin))
    for step in range(2):
        for each, net in ((optimizer, model), (other, twin)):
            each.backward(loss_of(net), batch(step))
    assert all(p.grad is view for p, view in zip(params, views, strict=True))
    assert all_same_bits(views, gradients(other))


@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [*((name, None) for name in NAMES), *((n, 5) for n in NAMES if n != "OrderedSGD")],
)
def test_losses_outlive_the_next_call_of_the_function(
    backend: str, name: str, micro_batch_size: int | None
) -> None:
    """What replays a CUDA graph writes to the losses it returned before."""
    model, twin = (network(dtype=torch.float64) for _ in range(2))
    own, other = (build(name, m, micro_batch_size=micro_batch_size) for m in (model, twin))
    returned: list[Tensor] = []

    def replayed(b: dict[str, Tensor]) -> Tensor:
        for before in returned:
            before.fill_(math.nan)
        of_batch = losses(model)(b)
        returned[:] = [of_batch.detach()]
        return of_batch

    for step in range(3):
        result = own.step(replayed, data_of(step % 2))
        expected = other.step(losses(twin), data_of(step % 2))
        replayed(data_of(0))
        assert torch.equal(result.losses, expected.losses)
        assert torch.equal(result.indices, expected.indices)
    assert all_same_bits(weights(model), weights(twin))


def test_members_of_an_ensemble_select_nothing_by_themselves(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs are as many as the batch's; top-k within vmap would be a loop, with a warning."""
    monkeypatch.delattr(ksam_kernels, "select_cross_entropy")
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, 8, 5))
    optimizer = KSAM([w], SGD, lr=0.1, k=8)
    taken = []

    def of_ensemble(b: dict[str, Tensor]) -> Tensor:
        of_members = torch.func.vmap(lambda v: cross_entropy(b["x"] @ v, b["y"]))(w)
        taken.append(of_members)
        return of_members.mean(0)

    result = optimizer.step(of_ensemble, batch())
    expected = torch.topk(taken[0].mean(0).detach(), 8).indices.sort().values
    assert torch.equal(result.indices, expected)
