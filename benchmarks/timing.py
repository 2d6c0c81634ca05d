"""Timing in rounds: when there are enough of them, whose turn it is, and what they come to."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.environment import synchronize

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How long to measure a case: at least `rounds` and `seconds`, which are enough for quartiles.

    Where rounds take seconds each, `few_rounds` must do after `max_seconds`.
    """

    rounds: int
    seconds: float
    few_rounds: int
    max_seconds: float
    max_rounds: int = 500

    def done(self, rounds: int, seconds: float) -> bool:
        """Whether these rounds, which took these seconds, are enough."""
        return (
            rounds >= self.max_rounds
            or (rounds >= self.rounds and seconds >= self.seconds)
            or (rounds >= self.few_rounds and seconds >= self.max_seconds)
        )


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of one or more values."""

    q25: float
    median: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of the values."""
        if len(values) == 1:  # statistics.quantiles needs two
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The items, beginning with another one each turn."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def ratios(times: Sequence[float], yardstick: Sequence[float]) -> list[float]:
    """A contestant's times over those of the yardstick, round by round."""
    return [a / b for a, b in zip(times, yardstick, strict=True)]


def seconds_for(run: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device) -> float:
    """Time that the calls on all inputs take, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    for input in inputs:
        run(input)
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not within the block."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
