"""Timing: contestants in turn, inputs from a pool that no cache holds, quartiles over rounds."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.environment import last_level_cache_bytes, synchronize
from benchmarks.kernels.case import Run

T = TypeVar("T")

# One sample lasts at least this long, so that the clock and its noise do not count.
_SAMPLE_SECONDS = {"cpu": 200e-6, "cuda": 2e-3}

# The pool of a case holds this many times the last-level cache, which an input has long left when
# its turn comes again. Small inputs do stay cached, as losses and logits just computed are; but
# there are so many of them that no branch predictor knows them by heart.
_CACHES = 4
_MIN_POOL, _MAX_POOL = 2, 64


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


DEFAULT_PLAN = Plan(rounds=11, seconds=2.0, few_rounds=5, max_seconds=8.0)
QUICK_PLAN = Plan(rounds=3, seconds=0.1, few_rounds=1, max_seconds=1.0)


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


def pool_size(input_bytes: int, device: torch.device) -> int:
    """How many different inputs a case rotates over."""
    enough = -(-_CACHES * last_level_cache_bytes(device) // max(input_bytes, 1))
    return min(max(enough, _MIN_POOL), _MAX_POOL)


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The items, beginning with another one each turn."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def time_in_turns(
    runs: dict[str, Run], pool: Sequence[Any], plan: Plan, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one number a round.

    A round times every contestant once, in an order that rotates: whatever else the machine is
    doing slows all of a round alike, and no contestant always runs in the caches that the same
    other one left behind. All take their inputs from one cycle through the pool, so that none gets
    an input that its predecessor has just brought into the cache.
    """
    inputs = itertools.cycle(pool)
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        calls = {name: _calls_per_sample(runs[name], inputs, device) for name in names}
        start = time.perf_counter()
        for number in itertools.count():
            if plan.done(number, time.perf_counter() - start):
                return times
            for name in rotated(names, number):
                sample = list(itertools.islice(inputs, calls[name]))
                times[name].append(_time(runs[name], sample, device) / len(sample))
    raise AssertionError("unreachable")


def ratios(times: Sequence[float], yardstick: Sequence[float]) -> list[float]:
    """A contestant's times over those of the yardstick, round by round."""
    return [a / b for a, b in zip(times, yardstick, strict=True)]


def copy_bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 15) -> float:
    """Bytes per second of `Tensor.copy_`, its reads and its writes counted."""
    source = torch.ones(megabytes << 18, device=device)  # float32
    target = torch.empty_like(source)
    target.copy_(source)  # the first write of a page is dear
    size = source.numel() * source.element_size()
    seconds = [_time(target.copy_, [source], device) for _ in range(rounds)]
    # The fastest: whatever else the machine does can only slow a copy.
    return 2 * size / min(seconds)


def _time(run: Run, inputs: Sequence[Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for input in inputs:
        run(input)
    synchronize(device)
    return time.perf_counter() - start


def _calls_per_sample(run: Run, inputs: Iterator[Any], device: torch.device) -> int:
    """Double the calls until a sample is long enough; this is the warm-up, too."""
    run(next(inputs))
    calls = 1
    while _time(run, list(itertools.islice(inputs, calls)), device) < _SAMPLE_SECONDS[device.type]:
        calls *= 2
    return calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
