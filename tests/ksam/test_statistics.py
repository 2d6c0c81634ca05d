"""What BatchNorm normalizes the passes over a subset with, and what it remembers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ksam import ESAM, KSAM, cross_entropy
from ksam.arguments import STATISTICS
from tests.device import DEVICE
from tests.helpers import all_same_bits
from tests.ksam.models import Batch, batch, loss_of, network, weights


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("k", [8, 1.0])
def test_running_statistics_are_those_of_one_plain_pass(
    backend: str, statistics: str, momentum: float | None, k: float
) -> None:
    model = network(batchnorm=True)
    model[1].momentum = momentum
    twin = copy.deepcopy(model)
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, k=k, model=model, statistics=statistics
    )
    for step in range(3):
        twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
        twin(batch(step)["x"])
        optimizer.step(loss_of(model), batch(step))
        for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-7)
    assert model[1].momentum == momentum
    assert model[1].training


@pytest.mark.parametrize("statistics", STATISTICS)
def test_subset_passes_normalize_with_the_statistics_asked_for(
    backend: str, statistics: str
) -> None:
    model = network(batchnorm=True, dtype=torch.float64)
    norm, data = model[1], batch(dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    norm.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, k=8, model=model,
        statistics=statistics,
    )  # fmt: skip
    before = norm.running_mean.clone(), norm.running_var.clone()
    optimizer.step(loss_of(model), data)
    whole, subset = seen[0][0], seen[1][0]
    mean, var = {
        "subset": (subset.mean(0), subset.var(0, correction=0)),
        "full": (whole.mean(0), whole.var(0)),
        "matched": (whole.mean(0), whole.var(0, correction=0)),
        "running": (0.9 * before[0] + 0.1 * whole.mean(0), 0.9 * before[1] + 0.1 * whole.var(0)),
    }[statistics]
    expected = (subset - mean) / (var + norm.eps).sqrt()
    for inputs, out in seen[1:]:
        assert inputs.shape[0] == 8
        torch.testing.assert_close(out, expected)
    if statistics == "matched":
        losses = F.cross_entropy(model[2:](seen[0][1]), data["y"], reduction="none")
        chosen = losses.topk(8).indices.sort().values
        torch.testing.assert_close(seen[1][1], seen[0][1][chosen])


@pytest.mark.parametrize("tracks", [False, True])
def test_layers_without_running_statistics_are_left_alone(backend: str, tracks: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, track_running_stats=tracks)
    norm.running_mean = norm.running_var = None
    model = nn.Sequential(nn.Linear(8, 6), norm, nn.Linear(6, 5))
    for statistics in STATISTICS:
        optimizer = KSAM(
            model.parameters(), torch.optim.SGD, lr=0.1, model=model, statistics=statistics
        )
        assert optimizer.step(loss_of(model), batch()).loss.isfinite()


@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_layer_in_evaluation_mode_is_left_alone(backend: str, statistics: str) -> None:
    """Frozen, as in fine-tuning, in a model that trains."""
    found = []
    for how in ("subset", statistics):
        model = network(batchnorm=True)
        model[1].eval()
        before = [b.clone() for b in model.buffers()]
        train(KSAM, model, how, k=8)
        assert all_same_bits([*model.buffers()], before)
        found.append(weights(model))
    assert all_same_bits(*found)


def test_a_layer_in_evaluation_mode_is_no_reason_to_warn(backend: str) -> None:
    model = network(batchnorm=True).eval()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss_of(model), batch())


def test_bfloat16_is_matched_in_float32(backend: str) -> None:
    model = network(batchnorm=True)
    with torch.no_grad():
        model[0].bias.fill_(20.0)  # statistics rounded to bfloat16 would be off by up to 0.06
    seen: list[tuple[Tensor, Tensor]] = []
    model[1].register_forward_hook(
        lambda _, inputs, out: seen.append((inputs[0].detach(), out.detach()))
    )

    def function(b: Batch) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return cross_entropy(model(b["x"]), b["y"])

    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, k=8, model=model,
        statistics="matched",
    )  # fmt: skip
    optimizer.step(function, batch())
    # Of the inputs of either pass: products of 24 and of 8 rows may be rounded to neighbours.
    (whole, _), (subset, out) = ((x.double(), y) for x, y in seen[:2])
    assert out.dtype == torch.bfloat16
    var, mean = torch.var_mean(whole, 0, correction=0)
    # In float32 means of 24 numbers up to 24 are off by less than 24 * 24 * 2**-24, in whatever
    # order; two of them and two deviations come together, over deviations of more than 0.1.
    assert float(whole.abs().max()) < 24
    assert float(min(var.min(), subset.var(0, correction=0).min())) > 0.1**2
    atol = 4 * 24 * 24 * 2**-24 / 0.1
    torch.testing.assert_close(
        out.double(), (subset - mean) / (var + model[1].eps).sqrt(), rtol=2**-8, atol=atol
    )


@pytest.mark.parametrize("affine", [True, False])
def test_matched_values_have_the_gradient_of_batchnorm(backend: str, affine: bool) -> None:
    """Both gradients against Batch Renormalization written out, with constants r and d."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, affine=affine)
    model = nn.Sequential(nn.Linear(8, 6), norm, nn.Tanh(), nn.Linear(6, 5)).double()
    twin, data, k, rho = copy.deepcopy(model), batch(dtype=torch.float64), 8, 0.1
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=rho, k=k, model=model,
        statistics="matched",
    )  # fmt: skip
    result = optimizer.step(loss_of(model), data)
    params, chosen = list(twin.parameters()), {n: v[result.indices] for n, v in data.items()}
    whole, subset = twin[0](data["x"]).detach(), twin[0](chosen["x"]).detach()
    var = whole.var(0, correction=0)
    r = (subset.var(0, correction=0) + norm.eps).sqrt() / (var + norm.eps).sqrt()
    d = (subset.mean(0) - whole.mean(0)) / (var + norm.eps).sqrt()

    def gradient() -> tuple[Tensor, ...]:
        x = twin[0](chosen["x"])
        x = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt() * r + d
        x = x * twin[1].weight + twin[1].bias if affine else x
        losses = F.cross_entropy(twin[3](twin[2](x)), chosen["y"])
        return torch.autograd.grad(losses, params)

    ascent = gradient()
    size = torch.stack([g.square().sum() for g in ascent]).sum().sqrt()
    torch.testing.assert_close(result.grad_norm, size.to(result.grad_norm.dtype))
    with torch.no_grad():
        for p, g in zip(params, ascent, strict=True):
            p += rho * g / size
    for p, g in zip(model.parameters(), gradient(), strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_norms_that_are_called_by_keyword(backend: str, statistics: str) -> None:
    class ByKeyword(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[3](self[2](self[1](input=self[0](x))))

    model = network(batchnorm=True)
    other = ByKeyword(*copy.deepcopy(model))
    for each in (model, other):
        train(KSAM, each, statistics, k=8)
    assert all_same_bits(weights(model), weights(other))


def train(method: type[Any], model: nn.Module, statistics: str, **options: Any) -> None:
    """Two steps."""
    optimizer = method(
        model.parameters(), torch.optim.SGD, lr=0.1, model=model, statistics=statistics, **options
    )
    for step in range(2):
        optimizer.step(loss_of(model), batch(step))


def test_nothing_is_matched_where_the_ascent_is_not_on_the_subset(backend: str) -> None:
    model, twin = network(batchnorm=True), network(batchnorm=True)
    train(ESAM, model, "matched", gamma=8)
    train(ESAM, twin, "subset", gamma=8)
    assert all_same_bits(weights(model), weights(twin))
    assert "forward" not in vars(model[1])


class WithActivation(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def with_activation(of: str) -> nn.Sequential:
    """A forward of its own, of the layer's class or of this layer alone."""
    torch.manual_seed(0)
    norm = WithActivation(6) if of == "class" else nn.BatchNorm1d(6)
    if of == "instance":
        forward = norm.forward
        norm.forward = lambda x: forward(x).relu()  # type: ignore[method-assign]
    return nn.Sequential(nn.Linear(8, 6), norm, nn.Linear(6, 5))


@pytest.mark.parametrize("of", ["class", "instance"])
def test_a_forward_that_is_not_batchnorms_own_is_kept(backend: str, of: str) -> None:
    model, twin = with_activation(of), with_activation(of)
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda _, __, out: outputs.append(out))
    train(KSAM, model, "matched", k=8)
    train(KSAM, twin, "subset", k=8)
    assert all_same_bits(weights(model), weights(twin))
    assert all(float(out.detach().min()) >= 0 for out in outputs)
    assert ("forward" in vars(model[1])) == (of == "instance")


@pytest.mark.parametrize("of", ["class", "instance"])
def test_statistics_of_the_batch_leave_a_forward_that_is_not_batchnorms_own(
    backend: str, of: str
) -> None:
    model = with_activation(of)
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    train(KSAM, model, "full", k=8)
    assert len(outputs) == 6
    assert all(float(out.min()) >= 0 for out in outputs)


class UsesTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.norm, self.once = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.once(self.first(x)).tanh()
        for _ in range(3):
            x = self.norm(self.second(x)).tanh()
        return self.last(x)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_used_more_than_once_is_updated_each_time(
    backend: str, statistics: str, momentum: float | None
) -> None:
    model = UsesTwice().double()
    model.norm.momentum = momentum
    twin, data = copy.deepcopy(model), batch(dtype=torch.float64)
    outputs: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, k=8, model=model, statistics=statistics
    )
    optimizer.step(loss_of(model), data)
    twin(data["x"])
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    if statistics in ("full", "matched"):  # as "subset": each use by its own statistics
        for out in outputs[3:6]:
            torch.testing.assert_close(out.mean(0), torch.zeros(6), check_dtype=False)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", ["once", "thrice"])
def test_buffers_that_a_functional_call_is_given_are_updated(
    backend: str, statistics: str, kind: str
) -> None:
    """The model's own, taken from it before the step."""
    model = (
        UsesTwice().double() if kind == "thrice" else network(batchnorm=True, dtype=torch.float64)
    )
    twin = copy.deepcopy(model)
    given = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    optimizer, other = (
        KSAM(m.parameters(), torch.optim.SGD, lr=0.1, k=8, model=m, statistics=of)
        for m, of in ((model, statistics), (twin, {"running": "running"}.get(statistics, "subset")))
    )
    settings = [dict(vars(module)) for module in model.modules()]
    for step in range(3):
        data = batch(step, dtype=torch.float64)
        optimizer.step(loss_of(lambda x: functional_call(model, given, (x,))), data)
        other.step(loss_of(twin), data)
    assert all_same_bits([*weights(model), *model.buffers()], [*weights(twin), *twin.buffers()])
    assert [dict(vars(module)) for module in model.modules()] == settings
    assert all(buffer is given[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_layer_that_no_pass_comes_by_keeps_its_statistics(
    backend: str, statistics: str, momentum: float | None
) -> None:
    model = network(batchnorm=True)
    model[1].unused = nn.BatchNorm1d(3, momentum=momentum)
    model[1].unused.running_mean.fill_(2.5)
    before = [b.clone() for b in model[1].unused.buffers()]
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, k=8, model=model, statistics=statistics
    )
    optimizer.step(loss_of(model), batch())
    assert all_same_bits([*model[1].unused.buffers()], before)


class Sometimes(nn.Module):
    """A BatchNorm that is used in the calls that are told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.uses = iter(())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if next(self.uses) else x


def test_matching_knows_nothing_of_the_step_before(backend: str) -> None:
    """Where a layer is dropped from the ascent's pass, the descent's has the subset's."""
    grads = []
    always, once = (True, True, True), (True, False, False)
    for uses, statistics in ((always, "matched"), (once, "matched"), (always, "subset")):
        layer = Sometimes()
        layer.norm.eps = 0.5
        model = nn.Sequential(layer, *network())
        optimizer = KSAM(
            model.parameters(), torch.optim.SGD, lr=0.0, k=8, model=model, statistics=statistics
        )
        for seed, calls in enumerate((uses, (True, False, True))):
            layer.uses = iter(calls)
            optimizer.step(loss_of(model), batch(seed))
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(all_same_bits(each, grads[0]) for each in grads)
