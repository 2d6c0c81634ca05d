"""The selection is by the losses that the function gives, however it makes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ksam
import ksam_kernels
from ksam import KSAM, ImportanceKSAM, SharpnessAware
from ksam.selection import Recording, recording
from tests.helpers import all_same_bits
from tests.ksam.models import Batch, batch, build, data_of, loss_of, losses, network, weights


@pytest.mark.parametrize("how", ["weighted", "in pieces", "mean of tokens"])
def test_losses_are_ranked_as_the_function_returns_them(backend: str, how: str) -> None:
    model = network()
    tokens = {"x": torch.randn(24, 7, 8), "y": torch.randint(5, (24, 7))}
    data = tokens if how == "mean of tokens" else {**batch(), "w": torch.rand(24)}

    def function(b: Batch) -> Tensor:
        if how == "weighted":
            return loss_of(model)(b) * b["w"]
        if how == "mean of tokens":
            return ksam.cross_entropy(model(b["x"]), b["y"]).mean(1)
        pieces = zip(model(b["x"]).split(6), b["y"].split(6), strict=True)
        return torch.cat([ksam.cross_entropy(x, y) for x, y in pieces])

    with torch.no_grad():
        expected = ksam_kernels.topk_indices(function(data), 8)
        unweighted = loss_of(model)(batch())
    assert how != "weighted" or not torch.equal(expected, ksam_kernels.topk_indices(unweighted, 8))
    result = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8).step(function, data)
    assert torch.equal(result.indices, expected)


@pytest.mark.parametrize("ignored", [{}, {"ignore_index": 1}], ids=["-100", "1"])
def test_ignored_classes_have_no_loss(backend: str, ignored: dict[str, int]) -> None:
    """In a step's selection too."""
    model, data = network(), batch()
    data["y"][::5] = ignored.get("ignore_index", -100)

    def function(b: Batch) -> Tensor:
        return ksam.cross_entropy(model(b["x"]), b["y"], **ignored)

    expected = F.cross_entropy(model(data["x"]), data["y"], reduction="none", **ignored).detach()
    torch.testing.assert_close(function(data).detach(), expected, rtol=1e-5, atol=1e-6)
    result = KSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=8).step(function, data)
    assert (result.losses[::5] == 0).all()
    assert torch.equal(result.indices, ksam_kernels.topk_indices(result.losses, 8))


@pytest.mark.parametrize("name", ["KSAM", "SAM", "MSAM", "ESAM", "ImportanceKSAM"])
def test_gradient_bounds_are_computed_where_they_are_read(
    backend: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They take another pass over the logits."""
    calls = []
    real = Recording.scores
    monkeypatch.setattr(Recording, "scores", lambda *args: calls.append(1) or real(*args))
    optimizer = build(name, network(dtype=torch.float64))
    optimizer.step(losses(optimizer.model), data_of(0))  # type: ignore[arg-type]
    assert len(calls) == (name == "ImportanceKSAM")


def test_the_share_is_float32(backend: str) -> None:
    optimizer = build("KSAM", network(dtype=torch.float64))
    optimizer.report_share = True
    result = optimizer.step(losses(optimizer.model), data_of(0))  # type: ignore[arg-type]
    assert result.share.dtype == torch.float32


def is_recorded(recorded: Recording, losses: Tensor) -> bool:
    """Its scores are then the gradients' bounds; of losses that it does not know, the losses."""
    return not torch.equal(recorded.scores(losses), losses)


def test_a_recording_is_of_its_thread(backend: str) -> None:
    """Both are open at once, and the one that was opened first is closed first."""
    logits, target = torch.randn(24, 5), batch()["y"]
    opened, close = threading.Event(), threading.Event()

    def record() -> Recording:
        with recording(24) as recorded:
            opened.set()
            assert close.wait(60)
        return recorded

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(record)
        try:
            assert opened.wait(60)
            with recording(24) as own:
                both = ksam.cross_entropy(logits, target)
                assert is_recorded(own, both)
                close.set()
                others = future.result(60)
                alone = ksam.cross_entropy(logits, target)
                assert is_recorded(own, alone)
        finally:
            close.set()
    after = ksam.cross_entropy(logits, target)
    assert not any(is_recorded(others, made) for made in (both, alone, after))
    assert not is_recorded(own, after)


def test_threads_that_train_at_once_find_the_shares_that_they_find_alone() -> None:
    models = [network(), network()]
    together = threading.Barrier(2, timeout=60)

    def share(seed: int, wait: Callable[[], Any]) -> Tensor:
        optimizer = KSAM(models[seed].parameters(), torch.optim.SGD, lr=0.0, k=8)
        optimizer.report_share = True

        def function(b: Batch) -> Tensor:
            wait()
            found = loss_of(models[seed])(b)
            wait()
            return found

        result = optimizer.step(function, batch(seed))
        assert result.share is not None
        return result.share

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(share, range(2), [together.wait] * 2))
    assert all_same_bits(found, [share(seed, lambda: None) for seed in range(2)])


def test_a_compiled_loss_is_one_program_within_a_recording_and_without(backend: str) -> None:
    logits, target = torch.randn(24, 5), batch()["y"]
    torch._dynamo.reset()
    programs: list[object] = []

    def compiler(program: torch.fx.GraphModule, _: object) -> Any:
        programs.append(program)
        return program.forward

    compiled = torch.compile(
        lambda x, y: ksam.cross_entropy(x, y), fullgraph=True, backend=compiler
    )
    expected = ksam_kernels.cross_entropy(logits, target)
    assert torch.equal(compiled(logits, target), expected)
    with recording(24, 8) as recorded:
        found = compiled(logits, target)
    assert torch.equal(found, expected)
    assert not is_recorded(recorded, found)
    assert len(programs) == 1


@pytest.mark.parametrize("where", ["everything", "the model", "losses written to"])
@pytest.mark.parametrize("method", [KSAM, ImportanceKSAM])
def test_a_selection_in_inference_mode_is_the_one_without_gradients(
    backend: str, method: type[SharpnessAware], where: str
) -> None:
    """Tensors made there have no version, and may not be differentiated later."""

    def run(mode: Callable[[], Any]) -> list[Tensor]:
        model = network()
        optimizer = method(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, k=8)
        optimizer.report_share = True

        def function(b: Batch) -> Tensor:
            selects = not torch.is_grad_enabled()
            with mode() if selects else nullcontext():
                logits, y, weight = model(b["x"]), b["y"] + 0, classes + 0
            if not selects:
                return ksam.cross_entropy(logits, y, weight=weight) * b["w"]
            with mode() if where != "the model" else nullcontext():
                made = ksam.cross_entropy(logits, y, weight=weight)
                return made.mul_(b["w"]) if where == "losses written to" else made

        torch.manual_seed(0)
        classes = torch.rand(5)
        batches = [{**batch(step), "w": torch.rand(24)} for step in range(3)]
        results = [optimizer.step(function, data) for data in batches]
        shares = [result.share for result in results if result.share is not None]
        return [*weights(model), *shares, *(result.indices for result in results)]

    assert all_same_bits(run(torch.inference_mode), run(torch.no_grad))
