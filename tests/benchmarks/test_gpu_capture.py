"""Capture and timing with CUDA's part played by recorders: which calls are made, and how often."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import capture, graph, kernels, sync

CUDA: Any = SimpleNamespace(type="cuda")


class Played:
    """Stands for `torch.cuda`: graphs hold what was called under capture, a millisecond a call."""

    def __init__(self) -> None:
        self.mode = "default"
        self.clock = 0.0
        self.calls = 0
        self.captured: list[int] = []

    def work(self) -> None:
        self.calls += 1
        self.clock += 1.0

    def waits(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.work()

    @property
    def namespace(self) -> SimpleNamespace:
        stream = SimpleNamespace(wait_stream=lambda _: None)
        return SimpleNamespace(
            Stream=lambda _: stream,
            current_stream=lambda _: stream,
            stream=lambda _: self._nothing(),
            synchronize=lambda *_: None,
            set_sync_debug_mode=lambda mode: setattr(self, "mode", mode),
            CUDAGraph=lambda: SimpleNamespace(replay=self._replay),
            graph=self._graph,
            Event=self._event,
        )

    @contextmanager
    def _nothing(self) -> Iterator[None]:
        yield

    @contextmanager
    def _graph(self, graph: Any, stream: Any) -> Iterator[None]:
        before = self.calls
        yield
        self.captured.append(self.calls - before)

    def _replay(self) -> None:
        self.clock += 0.1 * self.captured[-1]

    def _event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.clock)
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    for name, value in vars(played.namespace).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return played


def test_a_capture_warms_up_and_holds_one_call(cuda: Played) -> None:
    replay = capture.capture(cuda.work, CUDA)
    assert cuda.captured == [1]
    assert cuda.calls == capture.WARM_UP_CALLS + 1
    before = cuda.calls
    assert capture.seconds_of(replay, 5, CUDA) == pytest.approx(5 * 0.1e-3)
    assert cuda.calls == before


def test_what_a_graph_works_on_lives_as_long_as_its_replay(cuda: Played) -> None:
    weights = torch.zeros(3)
    alive = weakref.ref(weights)
    replay = capture.capture(partial(weights.add_, 1), CUDA)
    del weights
    gc.collect()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


def test_short_work_is_repeated_in_its_graph_and_long_work_is_not(cuda: Played) -> None:
    found = kernels.timed(cuda.work, CUDA)
    assert (found.mode, found.passes, found.replays) == ("graph", 10, 3)
    assert cuda.captured == [1, 10]
    times = kernels.rounds_of({"ksam": found}, 4, kernels._DRY_PLAN, CUDA)["ksam"]
    assert times == pytest.approx([0.1e-3 / 4] * 2)

    def long() -> None:
        for _ in range(50):
            cuda.work()

    assert kernels.timed(long, CUDA).passes == 1
    assert cuda.captured == [1, 10, 50]


def test_what_waits_is_timed_without_a_graph(cuda: Played) -> None:
    found = kernels.timed(cuda.waits, CUDA)
    assert (found.mode, found.passes) == ("eager", 1)
    assert cuda.captured == []
    assert cuda.mode == "default"
    seconds = kernels.rounds_of({"a": found}, 1, kernels._DRY_PLAN, CUDA)["a"]
    assert seconds == pytest.approx([1e-3] * 2)


def test_what_waits_is_not_begun_to_be_captured(cuda: Played) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        capture.capture(cuda.waits, CUDA)
    assert cuda.captured == []
    assert cuda.mode == "default"


def outcome(step: Callable[[], object]) -> dict[str, Any]:
    return sync._outcome(step, 3, CUDA)


def test_a_step_that_waits_is_found(cuda: Played) -> None:
    assert outcome(cuda.work) == {"waits": False}
    assert cuda.calls == 3
    found = outcome(cuda.waits)
    assert found["waits"]
    assert "synchronizing" in found["error"]
    assert cuda.mode == "default"


def test_eager_steps_are_as_many_as_the_graph_has_made(cuda: Played) -> None:
    made = []

    def make() -> SimpleNamespace:
        made.append(subject := SimpleNamespace(steps=0, rates=0, state=[torch.zeros(1)]))
        subject.step = lambda: setattr(subject, "steps", subject.steps + 1)
        subject.schedule = lambda: setattr(subject, "rates", subject.rates + 1)
        return subject

    assert graph.compare(make, CUDA)["captured"]
    eager, captured = made
    assert captured.steps == capture.WARM_UP_CALLS + 1  # one recorded, not run
    assert eager.steps == capture.WARM_UP_CALLS + graph._REPLAYS
    assert eager.rates == captured.rates == graph._REPLAYS  # before each step, or its replay
