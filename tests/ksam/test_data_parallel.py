"""Two processes of DistributedDataParallel, each with samples of its own; one backend is enough."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ksam import KSAM, AutoKSAM, StepResult, cross_entropy
from ksam.measures import alignment
from tests import ranks
from tests.helpers import all_same_bits
from tests.ksam.models import THRESHOLD, batch, loss_of, network, weights

RANKS = 2
K = 8  # of 24
RHO = 0.1
MICRO_BATCH_SIZE = 5
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "k": K}

pytestmark = ranks.needs_ranks


#: What is trained, and for how many steps; each with gradients that are views of buckets, or not.
STEPS = dict.fromkeys(("ksam", "micro-batches", "compiled", "two", "no_sync", "inner"), 5)
STEPS["auto"] = 16
#: Steps in two calls, the last by an optimizer that does not know of the ranks.
TWO_CALLS = ("two", "no_sync", "inner")

Found = dict[tuple[str, bool], Any]


def _train(rank: int, name: str, views: bool) -> dict[str, Any]:
    net = network(batchnorm=name == "auto")
    wrapped = DistributedDataParallel(net, gradient_as_bucket_view=views)
    model = torch.compile(wrapped, backend="eager") if name == "compiled" else wrapped
    optimizer = (
        AutoKSAM(
            model.parameters(), torch.optim.SGD, model=model, every=1, threshold=THRESHOLD,
            budget=None, **OPTIONS,
        )
        if name == "auto"
        else KSAM(
            model.parameters(), torch.optim.SGD, model=net if name == "inner" else model, rho=RHO,
            micro_batch_size=MICRO_BATCH_SIZE if name in ("micro-batches", "compiled") else None,
            **OPTIONS,
        )
    )  # fmt: skip
    averages = 0

    def average(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal averages
        averages += 1
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    average.__annotations__.clear()  # torch takes classes for them, and these are strings
    wrapped.register_comm_hook(None, average)
    optimizer.report_share = name == "auto"

    def step(i: int) -> StepResult:
        if name not in TWO_CALLS:
            return optimizer.step(loss_of(model), batch(RANKS * i + rank))
        optimizer.zero_grad()
        for call in (2 * i, 2 * i + 1):
            with wrapped.no_sync() if name == "no_sync" and call == 2 * i else nullcontext():
                result = optimizer.backward(loss_of(model), batch(RANKS * call + rank), weight=0.5)
        optimizer.step()
        return result

    results = [step(i) for i in range(STEPS[name])]
    return {
        "weights": weights(net),
        "sharp": [result.sharp for result in results],
        "shares": [None if result.share is None else float(result.share) for result in results],
        "losses": results[-1].losses,
        "averages": averages,
    }


class Sometimes(nn.Module):
    """A network, and a parameter that only some of its passes use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.some = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor, uses: bool) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + self.some if uses else logits


def _train_with_unused(rank: int, views: bool) -> dict[str, Any]:
    """A parameter that the call within no_sync() alone uses, or the one after it in no descent."""
    net = Sometimes()
    model = DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=views)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, model=model, rho=RHO, **OPTIONS)
    for step, plan in enumerate(("111000", "111110", "000111")):
        uses = iter(plan)
        optimizer.zero_grad()
        for call in (2 * step, 2 * step + 1):
            with model.no_sync() if call == 2 * step else nullcontext():
                optimizer.backward(
                    lambda b: cross_entropy(model(b["x"], next(uses) == "1"), b["y"]),  # noqa: B023
                    batch(RANKS * call + rank),
                    weight=0.5,
                )
        optimizer.step()
    return {"weights": weights(net)}


def _train_in_three_calls(rank: int, views: bool) -> dict[str, Any]:
    """Two of them within no_sync(), where DistributedDataParallel looks for unused parameters."""
    net = network()
    model = DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=views)
    optimizer = KSAM(model.parameters(), torch.optim.SGD, model=model, rho=RHO, **OPTIONS)
    for step in range(5):
        optimizer.zero_grad()
        for call in range(3 * step, 3 * step + 3):
            with model.no_sync() if call < 3 * step + 2 else nullcontext():
                optimizer.backward(loss_of(model), batch(RANKS * call + rank), weight=1 / 3)
        optimizer.step()
    return {"weights": weights(net)}


def _train_beside_alignment(
    rank: int, looks: bool, unused: bool = False, views: bool = False
) -> dict[str, Any]:
    """Steps whose first call is a rank's own, with a look at the alignment before each."""
    net = network(batchnorm=True)
    model = DistributedDataParallel(
        net, find_unused_parameters=unused, gradient_as_bucket_view=views
    )
    optimizer = KSAM(model.parameters(), torch.optim.SGD, model=model, rho=RHO, **OPTIONS)
    for step in range(3):
        if looks:
            before = [buffer.clone() for buffer in net.buffers()]
            alignment(optimizer, loss_of(model), batch(rank), K)
            assert all_same_bits([*net.buffers()], before)
        optimizer.zero_grad()
        for call in (2 * step, 2 * step + 1):
            with model.no_sync() if call == 2 * step else nullcontext():
                optimizer.backward(loss_of(model), batch(RANKS * call + rank), weight=0.5)
        optimizer.step()
    return {"weights": weights(net)}


def _see_statistics(rank: int, statistics: str, broadcasts: bool = True) -> list[Tensor]:
    """BatchNorm's running means in the passes of two steps, three each, and after them."""
    net = network(batchnorm=True)
    model = DistributedDataParallel(net, broadcast_buffers=broadcasts)
    optimizer = KSAM(
        model.parameters(), torch.optim.SGD, model=model, rho=RHO, statistics=statistics, **OPTIONS
    )
    seen: list[Tensor] = []
    net[1].register_forward_pre_hook(lambda norm, _: seen.append(norm.running_mean.clone()))
    for step in range(2):
        optimizer.step(loss_of(model), batch(RANKS * step + rank))
    assert model.broadcast_buffers == broadcasts
    return [*seen, net[1].running_mean.clone()]


def _train_all(rank: int, folder: Path) -> None:
    """A process: what its runs end with goes to a file."""
    runs = [(name, views) for name in STEPS for views in (False, True)]
    found = {run: _train(rank, *run) for run in runs}
    unused = {("unused", views): _train_with_unused(rank, views) for views in (False, True)}
    three = {("three", views): _train_in_three_calls(rank, views) for views in (False, True)}
    ways = [(False, False), (False, True), (True, False), (True, True)]
    beside = {
        ("beside", (looks, *way)): _train_beside_alignment(rank, looks, *way)
        for looks in (False, True)
        for way in ways
    }
    seen = {(name, False): _see_statistics(rank, name) for name in ("full", "running")}
    seen["own", False] = _see_statistics(rank, "full", broadcasts=False)
    torch.save({**found, **unused, **three, **beside, **seen}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """By rank."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.run(_train_all, RANKS, folder, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _mean_gradient(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    params = list(model.parameters())
    losses = [F.cross_entropy(model(b["x"]), b["y"]) for b in batches]
    return list(torch.autograd.grad(torch.stack(losses).mean(), params))


def _plain_gradient(model: nn.Module, step: int, alone: bool = False) -> list[Tensor]:
    """K-SAM's, averaged over the ranks, in one process and plain torch.

    Args:
        alone: each rank climbs along its own gradient, not along their average.
    """
    chosen = []
    for rank in range(RANKS):
        data = batch(RANKS * step + rank)
        with torch.no_grad():
            losses = F.cross_entropy(model(data["x"]), data["y"], reduction="none")
        top = losses.topk(K).indices
        chosen.append({name: tensor[top] for name, tensor in data.items()})
    if not alone:
        return _gradient_above(model, chosen)
    grads = [_gradient_above(model, [of_rank]) for of_rank in chosen]
    return [torch.stack(of_ranks).mean(0) for of_ranks in zip(*grads, strict=True)]


def _gradient_above(model: nn.Module, chosen: list[dict[str, Tensor]]) -> list[Tensor]:
    grads = _mean_gradient(model, chosen)
    norm = torch.sqrt(sum((g.square().sum() for g in grads), torch.zeros(())))
    old = weights(model)
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p += RHO * g / norm
    grads = _mean_gradient(model, chosen)
    with torch.no_grad():
        for p, w in zip(model.parameters(), old, strict=True):
            p.copy_(w)
    return grads


@pytest.mark.parametrize("name", ["ksam", "micro-batches", "compiled"])
@pytest.mark.parametrize("views", [False, True])
def test_both_gradients_are_means_over_the_ranks(
    found: list[Found], name: str, views: bool
) -> None:
    first, second = (of_rank[name, views] for of_rank in found)
    assert first["averages"] == second["averages"] == 2 * 5  # one bucket, once for a gradient
    assert all_same_bits(first["weights"], second["weights"])
    assert not torch.equal(first["losses"], second["losses"])
    _check_weights(first["weights"], [lambda model, step: _plain_gradient(model, step)])


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("views", [False, True])
def test_gradients_of_two_calls_add_up(found: list[Found], name: str, views: bool) -> None:
    """Where the first call averages nothing, the second averages the sum, and its own ascent's."""
    first, second = (of_rank[name, views] for of_rank in found)
    assert first["averages"] == second["averages"] == (2 if name == "no_sync" else 4) * 5
    assert all_same_bits(first["weights"], second["weights"])
    _check_weights(
        first["weights"],
        [
            lambda model, step: _plain_gradient(model, 2 * step, alone=name == "no_sync"),
            lambda model, step: _plain_gradient(model, 2 * step + 1),
        ],
    )


def test_parameters_that_some_passes_do_not_use_stay_alike(found: list[Found]) -> None:
    runs = [of_rank["unused", views]["weights"] for of_rank in found for views in (False, True)]
    assert all(all_same_bits(run, runs[0]) for run in runs)
    assert not any(weight.eq(0).all() for weight in runs[0])


@pytest.mark.parametrize("views", [False, True])
def test_calls_within_no_sync_climb_along_a_rank_s_own_gradient(
    found: list[Found], views: bool
) -> None:
    """The second of them too, to which there is a gradient already."""
    first, second = (of_rank["three", views] for of_rank in found)
    assert all_same_bits(first["weights"], second["weights"])
    _check_weights(
        first["weights"],
        [
            lambda model, step: _plain_gradient(model, 3 * step, alone=True),
            lambda model, step: _plain_gradient(model, 3 * step + 1, alone=True),
            lambda model, step: _plain_gradient(model, 3 * step + 2),
        ],
    )


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("views", [False, True])
def test_a_look_at_the_alignment_changes_nothing(
    found: list[Found], unused: bool, views: bool
) -> None:
    """Neither the average of a later pass nor the statistics of a rank."""
    for of_rank in found:
        runs = (of_rank["beside", (looks, unused, views)] for looks in (False, True))
        without, beside = (run["weights"] for run in runs)
        assert all_same_bits(without, beside)


@pytest.mark.parametrize("statistics", ["full", "running"])
def test_constant_statistics_are_a_rank_s_own_in_both_passes(
    found: list[Found], statistics: str
) -> None:
    first, second = (of_rank[statistics, False] for of_rank in found)
    for ascent, descent in ((1, 2), (4, 5)):
        assert not torch.equal(first[ascent], second[ascent])
        assert torch.equal(first[ascent], first[descent])
        assert torch.equal(second[ascent], second[descent])


def test_statistics_that_are_not_broadcast_stay_a_rank_s_own(found: list[Found]) -> None:
    first, second = (of_rank["own", False] for of_rank in found)
    for of_rank in (first, second):
        torch.testing.assert_close(of_rank[3], torch.lerp(of_rank[0], of_rank[1], 0.1))
        torch.testing.assert_close(of_rank[-1], torch.lerp(of_rank[3], of_rank[4], 0.1))
    assert not torch.equal(first[3], second[3])


def test_a_rank_s_batch_is_averaged_into_rank_0_s_statistics(found: list[Found]) -> None:
    """As DistributedDataParallel without this library does."""
    first, second = (of_rank["full", False] for of_rank in found)
    assert torch.equal(first[3], second[3])  # as the second step's first pass begins
    for of_rank in (first, second):
        of_batch, after = of_rank[4], of_rank[-1]
        torch.testing.assert_close(after, torch.lerp(first[3], of_batch, 0.1))


def _check_weights(
    found: list[Tensor], gradients: list[Callable[[nn.Module, int], list[Tensor]]]
) -> None:
    """They are those of steps along the mean of these gradients."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        grads = [gradient(model, step) for gradient in gradients]
        for p, of_calls in zip(model.parameters(), zip(*grads, strict=True), strict=True):
            p.grad = torch.stack(of_calls).mean(0)
        base.step()
    for weight, expected in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", [False, True])
def test_the_policy_decides_alike_on_all_ranks(found: list[Found], views: bool) -> None:
    first, second = (of_rank["auto", views] for of_rank in found)
    shares = list(zip(first["shares"], second["shares"], strict=True))
    assert any((a < THRESHOLD) != (b < THRESHOLD) for a, b in shares[:-1]), shares
    assert first["sharp"] == second["sharp"]
    means = [(a + b) / 2 >= THRESHOLD for a, b in shares]
    assert first["sharp"] == [False, *means[:-1]]
    assert set(means[:-1]) == {True, False}
    assert all_same_bits(first["weights"], second["weights"])
