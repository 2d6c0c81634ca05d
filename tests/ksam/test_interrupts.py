"""A signal at every line of the library in one step: all of the step has been done, or nothing.

Also in a measurement of sharpness, after which all is as it was.
"""

from __future__ import annotations

import _signal
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ksam
import ksam_kernels
from ksam import KSAM, interrupts
from tests.helpers import all_same_bits
from tests.ksam.models import batch, loss_of, network, weights

LIBRARY = str(Path(ksam.__file__).parent)


class PreemptedError(Exception):
    """What a handler of SIGTERM raises."""


def _preempt(number: int, frame: Any) -> None:
    raise PreemptedError


RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: PreemptedError}


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _preempt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    _raised.clear()
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after[signal.SIGTERM] is _preempt


class AtLine:
    """Sends a signal before the n-th line of the library that is run; notes the lines."""

    def __init__(self, n: int, number: signal.Signals = signal.SIGINT) -> None:
        self.n = n
        self.number = number
        self.lines: list[str] = []

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        if event == "line":
            if len(self.lines) == self.n:
                signal.raise_signal(self.number)
            self.lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self


def lines_of(function: Callable[[], object]) -> dict[str, int]:
    """Line of the library: the number of the last time that it is run."""
    tracing, trace = sys.gettrace(), AtLine(-1)
    sys.settrace(trace)
    function()
    sys.settrace(tracing)
    return {where: n for n, where in enumerate(trace.lines)}


#: The last one, which keeps the frames that it came through, as in a notebook.
_raised: list[BaseException] = []


@contextmanager
def interrupted_at(n: int, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    tracing = sys.gettrace()
    sys.settrace(AtLine(n, number))
    try:
        with pytest.raises(RAISED[number]) as caught:
            yield
    finally:
        sys.settrace(tracing)
    _raised[:] = [caught.value]


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


@pytest.mark.parametrize(
    ("number", "statistics"),
    [(signal.SIGINT, "subset"), (signal.SIGINT, "matched"), (signal.SIGTERM, "matched")],
)
def test_an_interrupted_step_is_whole_or_none(number: signal.Signals, statistics: str) -> None:
    done = Run(statistics)
    before = done.tensors()
    for where, n in lines_of(done.step).items():
        run = Run(statistics)
        settings = run.settings()
        with interrupted_at(n, number):
            run.step()
        steps = run.optimizer.steps_done
        assert all_same_bits(run.tensors(), {1: before, 2: done.tensors()}[steps]), (steps, where)
        assert run.settings() == settings, where


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_in_two_calls_is_whole_or_none(number: signal.Signals) -> None:
    """Weights and momentum move in the second; a step is done, for its parts, with the first."""

    def step(run: Run) -> None:
        run.optimizer.zero_grad()
        run.optimizer.backward(loss_of(run.model), batch(run.optimizer.steps_done))
        run.optimizer.step()

    done = Run("subset")
    before = done.tensors()
    lines = lines_of(lambda: step(done))
    moved = len(list(done.model.parameters()))  # then come buffers, then as many momenta
    first = [*before[:moved], *done.tensors()[moved:-moved], *before[-moved:]]
    for where, n in lines.items():
        run = Run("subset")
        with interrupted_at(n, number):
            step(run)
        steps, found = run.optimizer.steps_done, run.tensors()
        updated = all_same_bits(found, done.tensors())
        assert steps == 2 if updated else all_same_bits(found, [before, first][steps - 1]), where


def test_handlers_of_all_that_arrive_run_and_stay() -> None:
    """The one's exception does not keep the other away."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        raise PreemptedError

    ends = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "ALRM", "VTALRM", "PROF", "PIPE")
    names = (*ends, "CHLD", "CONT", "WINCH")
    numbers = [getattr(signal, f"SIG{name}") for name in names]

    @interrupts.deferred()
    def arrive_within() -> None:
        for number in numbers * 2:
            signal.raise_signal(number)
        seen.append(0)  # the end of the block

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        with pytest.raises(PreemptedError):
            arrive_within()
        assert seen[0] == 0
        assert sorted(seen[1:]) == sorted(numbers)
        assert all(signal.getsignal(number) is note for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_are_given_back_whatever_arrives_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = [signal.SIGINT, signal.SIGTERM]
    before = [signal.getsignal(number) for number in numbers]
    real = _signal.signal

    def interrupted(number: int, handler: Any) -> None:
        real(number, handler)
        if handler in before:
            raise KeyboardInterrupt

    monkeypatch.setattr(_signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        pass
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in numbers] == before


def measure(model: nn.Module) -> None:
    ksam.sharpness(model, loss_of(model), [batch()], directions=1)


def test_an_interrupted_measurement_gives_the_weights_back() -> None:
    model = network(batchnorm=True)
    before = [*weights(model), *(b.clone() for b in model.buffers())]
    for where, n in lines_of(lambda: measure(model)).items():
        with interrupted_at(n):
            measure(model)
        assert torch.is_grad_enabled(), where
        assert all_same_bits([*weights(model), *model.buffers()], before), where
        assert model[1].track_running_stats, where


def test_a_step_in_another_thread() -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    thread = threading.Thread(target=lambda: optimizer.step(loss_of(model), batch()))
    thread.start()
    thread.join()
    assert optimizer.steps_done == 1


def test_a_process_that_ignores_ctrl_c_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = KSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    perturb = ksam_kernels.perturb_

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return perturb(*args, **kwargs)

    monkeypatch.setattr(ksam_kernels, "perturb_", interrupted)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the end of the test
    optimizer.step(loss_of(model), batch())
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert optimizer.steps_done == 1
