"""Every method of the family against an independent version in plain torch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ksam
from ksam import KSAM
from tests.helpers import all_same_bits
from tests.ksam import plain
from tests.ksam.models import NAMES, SGD, STEPS, batch, build, data_of, losses, network, weights

Plain = Callable[[nn.Module, torch.optim.Optimizer, dict[str, Tensor], ksam.StepResult], None]


def same_samples(rho: float = 0.05) -> Plain:
    """SAM on the samples that the step says it took."""
    return lambda model, base, data, result: plain.sam(
        model, plain.rows(data, result.indices), plain.rows(data, result.indices), rho
    )


def is_drawn(step: int, count: int) -> list[bool]:
    drawn = random.Random(f"1/{step}")
    return [drawn.random() < 0.6 for _ in range(count)]


def plain_esam(eta: float | None = None) -> Plain:
    steps = iter(range(STEPS))

    def step(model: nn.Module, base: Any, data: Any, result: Any) -> None:
        drawn = is_drawn(next(steps), len([*model.parameters()]))
        plain.esam(model, data, 0.05, 0.6, 10, drawn, eta)

    return step


PLAIN: dict[str, Callable[[], Plain]] = {
    "KSAM": same_samples,
    "SAM": lambda: lambda model, base, data, result: plain.sam(model, data, data, 0.05),
    "ASAM": lambda: (
        lambda model, base, data, result: plain.asam(
            model, data, 0.5, 0.02, ["weight" in name for name, _ in model.named_parameters()]
        )
    ),
    "ESAM": plain_esam,
    "RandomSubsetSAM": lambda: (
        lambda model, base, data, result: plain.sam(
            model, plain.rows(data, result.indices), data, 0.05
        )
    ),
    "OrderedSGD": lambda: lambda model, base, data, result: plain.ordered(model, data, 9),
    "MSAM": lambda: (
        lambda model, base, data, result: plain.msam(model, base, data, 0.2, "momentum_buffer")
    ),
    "StaleKSAM": same_samples,
    "AUSAM": lambda: same_samples(0.1),
}


@pytest.mark.parametrize("batchnorm", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_those_of_an_independent_version(
    backend: str, name: str, batchnorm: bool
) -> None:
    model = network(dtype=torch.float64, batchnorm=batchnorm)
    other = copy.deepcopy(model)
    optimizer = build(name, model)
    base = torch.optim.SGD(other.parameters(), **SGD)
    reference = PLAIN[name]()
    for step in range(STEPS):
        data = data_of(step)
        result = optimizer.step(losses(model), data)
        reference(other, base, data, result)
        base.step()
    # ASAM hands the norm of the other parameters on as a float32 number.
    tolerance = {"rtol": 1e-5, "atol": 1e-8} if name == "ASAM" else {"rtol": 1e-9, "atol": 1e-11}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def test_other_steps_may_climb_along_the_momentum(backend: str) -> None:
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = build("KSAM", model, when=ksam.EveryNth(3), otherwise=ksam.Momentum(0.2))
    base = torch.optim.SGD(other.parameters(), **SGD)
    references = [PLAIN["KSAM"](), PLAIN["MSAM"](), PLAIN["MSAM"]()]
    for step in range(STEPS):
        data = data_of(step)
        result = optimizer.step(losses(model), data)
        assert result.sharp == (step % 3 == 0)
        references[step % 3](other, base, data, result)
        base.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["SAM", "ESAM", "MSAM"])
def test_other_methods_may_be_adaptive(backend: str, name: str) -> None:
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = build(name, model, adaptive=True, eta=0.03)
    base = torch.optim.SGD(other.parameters(), **SGD)
    esam = plain_esam(0.03)
    for step in range(STEPS):
        data = data_of(step)
        result = optimizer.step(losses(model), data)
        if name == "ESAM":
            esam(other, base, data, result)
        elif name == "SAM":
            plain.asam(other, data, 0.05, 0.03, [True] * 4)
        else:
            plain.msam(other, base, data, 0.2, "momentum_buffer", 0.03)
        base.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_asam_of_all_parameters_is_the_other_popular_form(backend: str) -> None:
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = build("ASAM", model, eta=0.0, scaled=None)
    base = torch.optim.SGD(other.parameters(), **SGD)
    for step in range(STEPS):
        optimizer.step(losses(model), data_of(step))
        plain.asam(other, data_of(step), 0.5, 0.0, [True] * 4)
        base.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_asam_of_named_weights_moves_nothing_without_a_norm(backend: str, bad: float) -> None:
    model = network(dtype=torch.float64)
    seen: list[list[Tensor]] = []

    def function(b: dict[str, Tensor]) -> Tensor:
        seen.append([p.detach().clone() for p in model.parameters()])
        return losses(model)(b) * (bad if len(seen) == 1 else 1)

    build("ASAM", model).step(function, data_of(0))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("base", "name"), [(torch.optim.AdamW, "exp_avg"), (torch.optim.NAdam, "exp_avg")]
)
def test_msam_climbs_along_adams_momentum(
    backend: str, base: type[torch.optim.Optimizer], name: str
) -> None:
    model = network(dtype=torch.float64)
    other = copy.deepcopy(model)
    optimizer = ksam.MSAM(model.parameters(), base, lr=1e-2, rho=0.2)
    plain_base = base(other.parameters(), lr=1e-2)  # type: ignore[call-arg]
    for step in range(STEPS):
        optimizer.step(losses(model), data_of(step))
        plain.msam(other, plain_base, data_of(step), 0.2, name)
        plain_base.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_msam_takes_one_gradient(backend: str) -> None:
    model = network(dtype=torch.float64)
    calls: list[int] = []
    ksam.MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9).step(
        lambda b: (calls.append(1), losses(model)(b))[1], data_of(0)
    )
    assert calls == [1]


def test_ordered_sgd_descends_with_accuracy() -> None:
    model = network(dtype=torch.float64)
    optimizer = ksam.OrderedSGD(model.parameters(), torch.optim.SGD, lr=0.1)
    assert isinstance(optimizer.q, ksam.AccuracySchedule)
    sizes = []
    for accuracy in (0.0, 0.79, 0.8, 0.9, 0.95, 0.995):
        optimizer.q.accuracy = accuracy
        sizes.append(
            len(optimizer.step(losses(model), batch(size=64, dtype=torch.float64)).indices)
        )
    assert sizes == [64, 64, 32, 16, 8, 4]
    resumed = ksam.OrderedSGD(model.parameters(), torch.optim.SGD, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.q.accuracy == 0.995  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"accuracy .*1.5"):
        optimizer.q.accuracy = 1.5


def test_esam_descends_on_exactly_gamma_samples_where_all_are_equal(backend: str) -> None:
    model = network(dtype=torch.float64)
    data = {name: tensor[:1].expand(24, *tensor.shape[1:]) for name, tensor in data_of(0).items()}
    assert build("ESAM", model).step(losses(model), data).indices.tolist() == list(range(10))


@pytest.mark.parametrize("name", ["RandomSubsetSAM", "KSAM"])
def test_random_samples_are_exactly_as_many_and_change(backend: str, name: str) -> None:
    model = network(dtype=torch.float64)
    optimizer = build(name, model)
    drawn = [optimizer.step(losses(model), data_of(0)).indices for _ in range(3)]
    size = {"RandomSubsetSAM": 6, "KSAM": 8}[name]
    assert all(len(set(indices.tolist())) == size for indices in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_half_of_the_mixed_selection_has_the_highest_losses(backend: str) -> None:
    model = network(dtype=torch.float64)
    data = data_of(0)
    highest = plain.largest(losses(model)(data).detach(), 4).tolist()
    assert set(highest) < set(build("KSAM", model).step(losses(model), data).indices.tolist())


@pytest.mark.parametrize("sharp", [True, False])
@pytest.mark.parametrize("random", [0.0, 0.5, 1.0])
def test_the_share_is_that_of_the_selection(backend: str, random: float, sharp: bool) -> None:
    """In a plain step, of what a sharpness-aware one would select."""
    found = []
    for when in (None, lambda step: sharp):
        model = network(dtype=torch.float64)
        optimizer = build("KSAM", model, random=random, when=when)
        optimizer.report_share = True
        found.append(optimizer.step(losses(model), data_of(0)))
    selected, reported = found
    share = selected.losses[selected.indices].sum() / selected.losses.sum()
    torch.testing.assert_close(reported.share, share, check_dtype=False)


def test_the_share_of_ordered_sgd_is_that_of_its_q(backend: str) -> None:
    optimizer = build("OrderedSGD", network(dtype=torch.float64))
    optimizer.report_share = True
    result = optimizer.step(losses(optimizer.model), data_of(0))  # type: ignore[arg-type]
    assert len(result.indices) == 9
    share = result.losses[result.indices].sum() / result.losses.sum()
    torch.testing.assert_close(result.share, share, check_dtype=False)


def test_importance_sampling_is_unbiased(backend: str) -> None:
    """Sample i is drawn with probability p_i, and its gradient weighted by 1 / (M p_i): the mean
    over all draws is the batch's gradient. At rho = 0, and within four standard deviations.
    """
    model = network(dtype=torch.float64)
    with torch.no_grad():
        model[2].weight *= 8  # some samples have hardly a gradient
    optimizer = build("ImportanceKSAM", model, rho=0.0, lr=0.0, uniform=0.3)
    data, steps = data_of(0), 400
    of_samples = [plain.gradient(model, plain.rows(data, torch.tensor([i]))) for i in range(24)]
    gradients = [torch.stack(of_parameter) for of_parameter in zip(*of_samples, strict=True)]
    bounds = (model(data["x"]).detach().softmax(1) - F.one_hot(data["y"], 5)).norm(dim=1)
    probability = 0.7 * bounds / bounds.sum() + 0.3 / 24
    counts = torch.zeros(24)
    for _ in range(steps):
        result = optimizer.step(lambda b: ksam.cross_entropy(model(b["x"]), b["y"]), data)
        counts += torch.bincount(result.indices, minlength=24)
        weight = 1 / (24 * probability[result.indices])
        for p, of_parameter in zip(model.parameters(), gradients, strict=True):
            expected = torch.einsum("i,i...->...", weight, of_parameter[result.indices]) / 8
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)
    draws = 8 * steps
    deviation = (draws * probability * (1 - probability)).sqrt()
    assert ((counts - draws * probability).abs() < 4 * deviation).all()


def test_negative_losses_have_a_share_and_can_be_drawn(backend: str) -> None:
    """Half of them below 0, as log-densities may be: those have a bound of 0."""
    model = network(dtype=torch.float64)

    def shifted(b: dict[str, Tensor]) -> Tensor:
        found = losses(model)(b)
        return found - 1.6

    optimizer = build("ImportanceKSAM", model, uniform=0.1)
    optimizer.report_share = True
    for _ in range(8):
        result = optimizer.step(shifted, data_of(0))
        positive = result.losses.clamp_min(0)
        assert 0 < int((positive > 0).sum()) < 24
        assert all(torch.isfinite(p).all() for p in model.parameters())
        # The samples with a gradient may all be drawn, and are added up in another order.
        assert 0 <= float(result.share) <= 1 + 24 * torch.finfo(torch.float32).eps
    ksam_step = build("KSAM", model, random=0.0)
    ksam_step.report_share = True
    assert 0 <= float(ksam_step.step(shifted, data_of(0)).share) <= 1


@pytest.mark.parametrize("scale", ["mean", "batch", "share"])
def test_a_batch_without_a_gradient_leaves_finite_weights(backend: str, scale: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8, scale=scale)
    before = weights(model)
    optimizer.step(lambda b: 0.0 * model(b["x"]).square().sum(1), batch())
    assert all_same_bits(weights(model), before)


@pytest.mark.parametrize(("scale", "factor"), [("mean", 1.0), ("batch", 8 / 24), ("share", None)])
def test_the_scale_of_the_subset_loss(backend: str, scale: str, factor: float | None) -> None:
    grads = []
    for how in ("mean", scale):
        model = network(dtype=torch.float64)
        optimizer = build("KSAM", model, random=0.0, scale=how)
        result = optimizer.step(losses(model), data_of(0))
        grads.append([p.grad for p in model.parameters()])
    if factor is None:
        share = result.losses[result.indices].sum() / result.losses.sum()
        factor = 8 / 24 / float(share)
    for mean, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled, mean * factor, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_counted(name: str) -> None:
    expected = {
        "KSAM": (24 + 48) / 72,
        "SAM": 2.0,
        "ASAM": 2.0,
        "ESAM": (72 + 24 + 30) / 72,
        "RandomSubsetSAM": 1.25,
        "OrderedSGD": 1.0,
        "MSAM": 1.0,
        "StaleKSAM": (24 + 48) / 72,
        "AUSAM": 2.0,
        "ImportanceKSAM": (24 + 48) / 72,
    }[name]
    optimizer = build(name, network())
    assert optimizer.cost(24) == pytest.approx(expected)
    later = {"StaleKSAM": 48 / 72, "AUSAM": 54 / 72}.get(name, expected)
    assert optimizer.cost(24, 3) == pytest.approx(later)


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_called_as_often_as_the_method_says(backend: str, name: str) -> None:
    model = network(batchnorm=True, dtype=torch.float64)
    optimizer = build(name, model)
    calls: list[tuple[int, bool]] = []

    def function(b: dict[str, Tensor]) -> Tensor:
        calls.append((len(b["y"]), torch.is_grad_enabled()))
        return losses(model)(b)

    spent = 0.0
    for step in range(STEPS):
        expected = optimizer.cost(24)
        calls.clear()
        optimizer.step(function, data_of(step))
        spent = sum(size * (3 if grad else 1) for size, grad in calls) / 72
        assert spent == pytest.approx(expected)
    assert int(model[1].num_batches_tracked) == STEPS
