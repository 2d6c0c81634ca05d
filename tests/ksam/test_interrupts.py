"""Ctrl-C at every line of the library in one step: all of the step has been done, or nothing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ksam
from ksam import KSAM
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, weights

LIBRARY = str(Path(ksam.__file__).parent)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class AtLine:
    """Sends SIGINT before the n-th line of the library that is run; notes the lines."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.lines: list[str] = []

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            if len(self.lines) == self.n:
                signal.raise_signal(signal.SIGINT)
            self.lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self


class Run:
    """A model after one step, and what its second one changes."""

    def __init__(self, statistics: str) -> None:
        self.model = nn.Sequential(network(batchnorm=True), nn.BatchNorm1d(5))
        self.optimizer = KSAM(
            self.model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=self.model,
            statistics=statistics,
        )  # fmt: skip
        self.step()

    def step(self) -> None:
        self.optimizer.step(loss_of(self.model), batch(self.optimizer.steps_done))

    def tensors(self) -> list[Tensor]:
        momentum = [entry["momentum_buffer"].clone() for entry in self.optimizer.state.values()]
        return [*weights(self.model), *(b.clone() for b in self.model.buffers()), *momentum]

    def settings(self) -> list[Any]:
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm1d)]
        names = ("training", "track_running_stats", "momentum", "forward")
        flags = [vars(norm).get(name) for norm in norms for name in names]
        return [*flags, *(id(b) for b in self.model.buffers())]


@pytest.mark.parametrize("statistics", ["subset", "matched"])
def test_an_interrupted_step_is_whole_or_none(statistics: str) -> None:
    done = Run(statistics)
    before = done.tensors()
    tracing, trace = sys.gettrace(), AtLine(-1)
    sys.settrace(trace)
    done.step()
    sys.settrace(tracing)
    last_time = {where: n for n, where in enumerate(trace.lines)}
    for where, n in last_time.items():
        run = Run(statistics)
        settings = run.settings()
        sys.settrace(AtLine(n))
        try:
            with pytest.raises(KeyboardInterrupt):
                run.step()
        finally:
            sys.settrace(tracing)
        steps = run.optimizer.steps_done
        assert all_same_bits(run.tensors(), {1: before, 2: done.tensors()}[steps]), (steps, where)
        assert run.settings() == settings, where
