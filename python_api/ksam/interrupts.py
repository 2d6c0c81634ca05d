"""Ctrl-C waits while weights are in between two states."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred() -> Iterator[None]:
    """A SIGINT that arrives within takes effect on leaving.

    Python raises KeyboardInterrupt between any two bytecodes of the main thread, so also between
    writing the weights and noting that they were written. Other threads never see it.
    """
    handler = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            handler(*arrived[0])


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Calls ``undo`` on leaving; it may be called twice.

    In a ``finally`` alone Ctrl-C may arrive on the way to its first statement, which then never
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
