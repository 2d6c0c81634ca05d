"""When steps are sharpness-aware: schedules of the step, and the policy that reads the shares."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ksam
from ksam import KSAM, SAM, AutoKSAM, EveryNth, From, Momentum, Representative, composed
from tests.device import DEVICE
from tests.helpers import all_same_bits
from tests.ksam.models import batch, build, data_of, loss_of, losses, network, weights


def sharp_steps(optimizer: Any, function: Callable[[Any], Any], steps: int = 12) -> list[bool]:
    return [optimizer.step(function, batch(step)).sharp for step in range(steps)]


def with_share(share: float, *, k: int = 8, size: int = 24) -> Callable[[Any], Tensor]:
    """Losses whose k highest carry a share of the sum; a weight is there to have a gradient."""
    high, low = share / k, (1 - share) / (size - k)

    def function(b: dict[str, Tensor]) -> Tensor:
        count = len(b["y"])
        whole = torch.tensor([high] * k + [low] * (size - k))[:count]
        return whole * b["w"][0] * PARAMETER

    return function


PARAMETER = torch.nn.Parameter(torch.ones(()))


def of_shares(shares: list[float], **arguments: Any) -> tuple[list[bool], Representative]:
    """Which steps are sharp where the steps' batches have these shares."""
    policy = Representative(**{"threshold": 0.6, "every": 1, "budget": None, **arguments})
    optimizer = KSAM([PARAMETER], torch.optim.SGD, lr=0.0, k=8, when=policy)
    data = {**batch(), "w": torch.ones(24)}
    return [optimizer.step(with_share(s), data).sharp for s in shares], policy


def test_schedules_of_the_step(backend: str) -> None:
    model = network()
    late = SAM(model.parameters(), torch.optim.SGD, lr=0.1, when=From(9))
    assert sharp_steps(late, loss_of(model)) == [False] * 9 + [True] * 3
    nth = SAM(model.parameters(), torch.optim.SGD, lr=0.1, when=EveryNth(4))
    assert sharp_steps(nth, loss_of(model)) == [True, False, False, False] * 3


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_plain_step_is_the_base_optimizers(
    backend: str, base: type[torch.optim.Optimizer]
) -> None:
    model = network(dtype=torch.float64, batchnorm=True)
    twin = copy.deepcopy(model)
    optimizer = KSAM(model.parameters(), base, lr=0.01, model=model, when=lambda step: False)
    plain = base(twin.parameters(), lr=0.01)  # type: ignore[call-arg]
    for step in range(5):
        data = batch(step, dtype=torch.float64)
        result = optimizer.step(
            lambda b: F.cross_entropy(model(b["x"]), b["y"], reduction="none"), data
        )
        plain.zero_grad()
        loss = F.cross_entropy(twin(data["x"]), data["y"])
        loss.backward()
        plain.step()
        torch.testing.assert_close(result.loss, loss.detach())
        assert not result.sharp
        assert len(result.indices) == 24
        assert float(result.grad_norm) == 0
    # The bias before BatchNorm has no gradient but what rounding leaves of some terms of 1e-2 that
    # cancel, 1e-17 or so. AdamW divides it by 1e-8, so that in five steps of lr = 0.01 it moves by
    # 5e-10 at most where the rounding is ten times that.
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_it_is_on_from_the_step_after_a_representative_batch(backend: str) -> None:
    sharp, _ = of_shares([0.5, 0.7, 0.7, 0.4, 0.4, 0.9, 0.9])
    assert sharp == [False, False, True, True, False, False, True]


def test_a_share_equal_to_the_threshold_is_enough(backend: str) -> None:
    assert of_shares([0.75] * 3, threshold=0.75)[0] == [False, True, True]


def test_probes_decide_for_a_whole_block_one_block_later(backend: str) -> None:
    sharp, _ = of_shares([0.7, 0.1, 0.1, 0.2, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1], every=3)
    assert sharp == [False] * 3 + [True] * 3 + [False] * 3 + [True]


def test_the_budget_is_kept(backend: str) -> None:
    """A step at k = 8 of 24 costs 1, one at k = 12 costs 4/3."""
    model = network()

    def sharp_share(k: int, budget: float | None) -> float:
        policy = Representative(threshold=0.0, every=1, budget=budget)
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.0, k=k, when=policy)
        steps = sharp_steps(optimizer, loss_of(model), 60)
        assert policy.spent == pytest.approx(sum(optimizer.cost(24) if s else 1 for s in steps))
        assert policy.steps == 60
        return sum(steps) / 60

    assert sharp_share(8, 1.0) == 59 / 60
    assert sharp_share(12, None) == 59 / 60
    assert sharp_share(12, 1.0) == pytest.approx(0.06, abs=0.02)  # the 2 % that are tolerated
    assert sharp_share(12, 1.1) == pytest.approx(0.366, abs=0.02)


def test_a_probe_comes_to_the_host_whatever_the_default_device(backend: str) -> None:
    """Only from a GPU is it copied, into memory that is pinned and so the host's."""
    model, data = network(), [batch(step) for step in range(4)]
    policy = Representative(threshold=0.0, every=2, budget=None)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8, when=policy)
    with torch.device(DEVICE):
        sharp = [optimizer.step(loss_of(model), b).sharp for b in data]
    assert sharp == [False, False, True, True]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_share_is_that_of_the_gradient_bounds(backend: str, smoothing: float) -> None:
    model, data = network(), batch()
    with torch.no_grad():
        logits = model(data["x"])
        target = F.one_hot(data["y"], 5) * (1 - smoothing) + smoothing / 5
        bounds = (logits.softmax(1) - target).norm(dim=1)
        options: dict[str, Any] = {"label_smoothing": smoothing}
        losses = ksam.cross_entropy(logits, data["y"], **options)
    top = torch.sort(losses, stable=True, descending=True).indices[:8]
    expected = bounds[top].sum() / bounds.sum()

    def function(b: dict[str, Tensor]) -> Tensor:
        return ksam.cross_entropy(model(b["x"]), b["y"], **options)

    for threshold in (1.0, 0.0):  # of a plain step, then of a sharp one: the same weights
        policy = Representative(threshold=threshold, every=1, budget=None)
        optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.0, k=8, when=policy)
        for _ in range(2):
            result = optimizer.step(function, data)
        assert result.sharp == (threshold == 0.0)
        torch.testing.assert_close(result.share, expected, rtol=1e-5, atol=0)


def test_a_share_costs_no_pass(backend: str) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8, when=Representative())
    calls: list[int] = []
    for step in range(10):
        optimizer.step(lambda b: (calls.append(len(b["y"])), loss_of(model)(b))[1], batch(step))
    assert calls == [24] * 10


@pytest.mark.parametrize("done", [1, 4, 5])
def test_decisions_survive_a_resume(backend: str, done: int) -> None:
    def build(model: torch.nn.Module) -> KSAM:
        policy = Representative(threshold=0.4, every=3, budget=1.1)
        return KSAM(model.parameters(), torch.optim.SGD, lr=0.5, k=11, when=policy)

    model = network()
    optimizer = build(model)
    sharp_steps(optimizer, loss_of(model), done)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = network()
    twin.load_state_dict(saved[0])
    resumed = build(twin)
    resumed.load_state_dict(saved[1])
    copied = copy.deepcopy(optimizer)
    expected = sharp_steps(optimizer, loss_of(model), 30)
    assert sharp_steps(resumed, loss_of(twin), 30) == expected
    assert 0 < sum(expected) < 30
    assert all_same_bits(weights(model), weights(twin))
    assert copied.state_dict()["ksam"] != optimizer.state_dict()["ksam"]


def test_a_method_whose_first_epoch_takes_all_is_probed_by_what_it_takes_later(
    backend: str,
) -> None:
    """AUSAM's gradients are of all samples in its first epoch, of alpha M afterwards."""
    model = network(dtype=torch.float64)
    policy = Representative(1.0, every=1, budget=None)
    optimizer = build("AUSAM", model, when=policy)
    found = optimizer.step(losses(model), data_of(0)).losses
    share = found.topk(9).values.sum() / found.sum()
    assert policy.state_dict()["probe"] == pytest.approx(share.item(), rel=1e-5)


def test_a_failed_step_does_not_count(backend: str) -> None:
    model = network()
    policy = Representative(threshold=0.0, every=1)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, when=policy)
    optimizer.step(loss_of(model), batch())
    before = policy.state_dict()
    with pytest.raises(ValueError, match="one loss per sample"):
        optimizer.step(lambda b: loss_of(model)(b).mean(), batch())
    assert policy.state_dict() == before


def other_steps(otherwise: Any, **arguments: Any) -> KSAM:
    options = {"lr": 0.1, "momentum": 0.9, "when": EveryNth(2), **arguments}
    return KSAM(network().parameters(), torch.optim.SGD, otherwise=otherwise, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Representative(threshold=1.5), ValueError, r"threshold .*1\.5"),
        (lambda: Representative(every=0), ValueError, r"every .*0"),
        (lambda: Representative(every=2.0), TypeError, r"every .*2\.0"),
        (lambda: Representative(budget=-1.0), ValueError, r"budget .*-1\.0"),
        (lambda: From(-1), ValueError, r"start .*-1"),
        (lambda: EveryNth(0), ValueError, r"n must be >= 1, got 0"),
        (
            lambda: SAM(network().parameters(), torch.optim.SGD, lr=0.1, when=3),
            TypeError,
            r"when .*3",
        ),
        (lambda: Momentum(-0.5), ValueError, r"rho .*-0\.5"),
        (lambda: other_steps(EveryNth(2)), TypeError, r"otherwise .*EveryNth"),
        (lambda: other_steps(Momentum(), when=None), ValueError, r"otherwise .*Momentum"),
        (lambda: other_steps(Momentum(), momentum=0.0), ValueError, r"momentum .*momentum=0\.0"),
    ],
)
def test_arguments_out_of_range_are_named(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_last_probe_decides_where_steps_do_not_see_the_batch(backend: str) -> None:
    model = network()
    policy = Representative(threshold=0.0, every=2, budget=None)
    optimizer = ksam.StaleKSAM(
        model.parameters(),
        torch.optim.SGD,
        lr=0.1,
        dataset_size=24,
        index="i",
        refresh=8,
        when=policy,
    )
    data = {**batch(), "i": torch.arange(24)}
    sharp = [optimizer.step(loss_of(model), data).sharp for _ in range(12)]
    assert sharp == [False] * 2 + [True] * 10


@pytest.mark.parametrize("radius", [0.2, None])
def test_the_automatic_k_sam_is_made_of_its_parts(backend: str, radius: float | None) -> None:
    model, twin = network(batchnorm=True), network(batchnorm=True)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "k": 8}
    auto = AutoKSAM(
        model.parameters(), torch.optim.SGD, model=model, momentum_rho=radius, threshold=0.36,
        every=2, **options,
    )  # fmt: skip
    parts = KSAM(
        twin.parameters(), torch.optim.SGD, model=twin, when=Representative(0.36, 2),
        otherwise=None if radius is None else Momentum(radius), scale="batch",
        statistics="matched", **options,
    )  # fmt: skip
    sharp = sharp_steps(auto, loss_of(model))
    assert set(sharp[2:]) == {True, False}  # these shares are 0.35 to 0.38
    assert sharp == sharp_steps(parts, loss_of(twin))
    assert all_same_bits([*weights(model), *model.buffers()], [*weights(twin), *twin.buffers()])


@pytest.mark.parametrize(("base", "radius"), [(torch.optim.SGD, 0.3), (torch.optim.AdamW, 0.05)])
@pytest.mark.parametrize("built", [False, True])
def test_the_radius_along_momentum_is_of_the_base_s_kind(
    base: type[torch.optim.Optimizer], radius: float, built: bool
) -> None:
    params = [*network().parameters()]
    options: dict[str, Any] = {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizer = AutoKSAM(None, base(params, **options)) if built else AutoKSAM(
        params, base, **options
    )  # fmt: skip
    assert isinstance(optimizer.otherwise, Momentum)
    assert optimizer.otherwise.rho == radius


def test_the_radius_along_momentum_may_be_set_anew(backend: str) -> None:
    model, twin = network(), network()
    optimizer = AutoKSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.momentum_rho = 0.7
    other = AutoKSAM(twin.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, momentum_rho=0.7)
    for seed in range(3):
        optimizer.step(loss_of(model), batch(seed))
        other.step(loss_of(twin), batch(seed))
    assert all_same_bits(weights(model), weights(twin))
    assert optimizer.momentum_rho == 0.7
    with pytest.raises(ValueError, match=r"^momentum_rho must be .*-1"):
        optimizer.momentum_rho = -1
    assert optimizer.momentum_rho == 0.7
    optimizer.momentum_rho = "auto"
    assert optimizer.momentum_rho == 0.3
    optimizer.momentum_rho = None
    assert optimizer.momentum_rho is None
    assert optimizer.otherwise is None


def test_the_automatic_k_sam_needs_momentum_unless_told_otherwise() -> None:
    params = [*network().parameters()]
    with pytest.raises(ValueError, match=r"momentum .*got SGD with momentum=0"):
        AutoKSAM(params, torch.optim.SGD, lr=0.1)
    assert AutoKSAM(params, torch.optim.SGD, lr=0.1, momentum_rho=None).otherwise is None
    with pytest.raises(ValueError, match="threshold"):
        AutoKSAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, threshold=2.0)


def test_scale_and_statistics_of_the_automatic_k_sam_may_be_given() -> None:
    optimizer = AutoKSAM(
        network().parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, scale="mean",
        statistics="running",
    )  # fmt: skip
    assert (optimizer.scale, optimizer.statistics) == ("mean", "running")


def test_ranks_that_would_decide_alone_take_no_sharp_steps(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may train one model, and gradients of steps of different kinds would be averaged."""
    model = network()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "threshold": 0.0, "budget": None}
    alone, of_ranks = (
        AutoKSAM(model.parameters(), torch.optim.SGD, every=2, **options) for _ in range(2)
    )
    assert sharp_steps(alone, loss_of(model), 5) == [False] * 2 + [True] * 3
    monkeypatch.setattr(composed, "has_ranks", lambda: True)
    with pytest.warns(UserWarning, match="pass the DistributedDataParallel module as model="):
        of_ranks.step(loss_of(model), batch())
    assert not any(sharp_steps(of_ranks, loss_of(model), 5))  # nor is there another warning
