"""Ctrl-C and other signals wait while weights are in between two states."""

from __future__ import annotations

# What `signal` is built on: without the enumerations, it is ten times as fast.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: All but the real-time signals, which are as many again. (A DataLoader handles SIGCHLD, and raises
#: where a worker was killed.) Plain integers: enumerations take longer to ask about.
_SIGNALS = [int(s) for s in signal.valid_signals() if s < getattr(signal, "SIGRTMIN", signal.NSIG)]

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that arrive within take effect on leaving, if their handlers are Python's.

    Python runs these between any two bytecodes of the main thread, so also between writing the
    weights and noting that they were written, and what they raise (KeyboardInterrupt, SystemExit, a
    limit's timeout) is raised there. Other threads never see it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Handler] = {
        number: handler for number in _SIGNALS if callable(handler := _signal.getsignal(number))
    }
    put_back = [(_signal.signal, number, handler) for number, handler in handlers.items()]
    arrived: dict[int, FrameType | None] = {}

    try:
        # Twice, as in undone(): the first handler put back may raise.
        try:
            for number in handlers:
                _signal.signal(number, arrived.setdefault)
            yield
        finally:
            _call_all(put_back)
    except BaseException:
        _call_all(put_back)
        raise
    finally:
        _call_all([(handlers[number], number, frame) for number, frame in arrived.items()])


def _call_all(calls: list[tuple[Callable[..., Any], int, Any]]) -> None:
    """Make all the calls, even if one of them raises, or a handler that was put back."""
    if calls:
        function, number, argument = calls[0]
        try:
            function(number, argument)
        finally:
            _call_all(calls[1:])


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Calls ``undo`` on leaving; it may be called twice.

    With a ``finally`` alone, Ctrl-C may arrive on the way to its first statement, which then never
    runs.
    """
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        with deferred():
            undo()
        raise
