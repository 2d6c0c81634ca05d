"""Timing: contestants in turn, inputs from a pool that no cache holds, quartiles over rounds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.environment import last_level_cache_bytes
from benchmarks.kernels.case import Run
from benchmarks.timing import Plan, no_garbage_collection, rotated, seconds_for

# One sample lasts at least this long, so that the clock and its noise do not count.
_SAMPLE_SECONDS = {"cpu": 200e-6, "cuda": 2e-3}

# The pool of a case holds this many times the last-level cache, which an input has long left when
# its turn comes again. Small inputs do stay cached, as losses and logits just computed are; but
# there are so many of them that no branch predictor knows them by heart.
_CACHES = 4
_MIN_POOL, _MAX_POOL = 2, 64


DEFAULT_PLAN = Plan(rounds=11, seconds=2.0, few_rounds=5, max_seconds=8.0)
QUICK_PLAN = Plan(rounds=3, seconds=0.1, few_rounds=1, max_seconds=1.0)


def pool_size(input_bytes: int, device: torch.device) -> int:
    """How many different inputs a case rotates over."""
    enough = -(-_CACHES * last_level_cache_bytes(device) // max(input_bytes, 1))
    return min(max(enough, _MIN_POOL), _MAX_POOL)


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
    with no_garbage_collection():
        calls = {name: _calls_per_sample(runs[name], inputs, device) for name in names}
        start = time.perf_counter()
        for number in itertools.count():
            if plan.done(number, time.perf_counter() - start):
                return times
            for name in rotated(names, number):
                sample = list(itertools.islice(inputs, calls[name]))
                times[name].append(seconds_for(runs[name], sample, device) / len(sample))
    raise AssertionError("unreachable")


def copy_bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 15) -> float:
    """Bytes per second of `Tensor.copy_`, its reads and its writes counted."""
    source = torch.ones(megabytes << 18, device=device)  # float32
    target = torch.empty_like(source)
    target.copy_(source)  # the first write of a page is dear
    size = source.numel() * source.element_size()
    seconds = [seconds_for(target.copy_, [source], device) for _ in range(rounds)]
    # The fastest: whatever else the machine does can only slow a copy.
    return 2 * size / min(seconds)


def _calls_per_sample(run: Run, inputs: Iterator[Any], device: torch.device) -> int:
    """Double the calls until a sample is long enough; this is the warm-up, too."""
    run(next(inputs))
    calls = 1
    while (
        seconds_for(run, list(itertools.islice(inputs, calls)), device)
        < _SAMPLE_SECONDS[device.type]
    ):
        calls *= 2
    return calls
