"""Cost of a step relative to the base optimizer's, measured side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.environment import synchronize
from benchmarks.train.config import TrainConfig
from benchmarks.train.loop import data_generator, seeded_model
from benchmarks.train.methods import Method, Step, make_step
from benchmarks.train.workload import Batch, Workload

_WARMUP_ROUNDS = 3
_BATCHES = 8

# Where the number of rounds is not given: enough for steady quartiles, but not all day where a
# step takes seconds.
_MIN_ROUNDS, _MIN_SECONDS = 15, 15.0
_FEW_ROUNDS, _MAX_SECONDS = 5, 60.0
_MAX_ROUNDS = 1000


@dataclass(frozen=True)
class StepCost:
    """A step's time over the base optimizer's: quartiles of the ratios within each round."""

    q1: float
    median: float
    q3: float
    rounds: int
    milliseconds: float  # median time of a step


def measure_step_costs(
    workload: Workload, methods: list[Method], config: TrainConfig
) -> dict[str, StepCost]:
    """Time single steps of all methods in turn; return their costs by the method's name.

    Args:
        methods: the first one is the yardstick, the base optimizer alone.
        config: with `timing_rounds` 0 there are no costs, just a few steps of each method to warm
            up the libraries for what is timed next.

    A round gives every method one step on the same batch, and the ratios are taken within rounds:
    what else the machine is doing slows all of a round's steps alike. The order rotates, so that
    none of them always runs in the caches another one left behind.
    """
    batches = list(
        itertools.islice(workload.train_batches(config.batch_size, data_generator(0)), _BATCHES)
    )
    steps = {m.name: _new_step(m, workload, config) for m in methods}
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for number in itertools.count(-_WARMUP_ROUNDS):
        if number == 0:
            start = time.perf_counter()
        if _enough(number, time.perf_counter() - start, config.timing_rounds):
            break
        batch = batches[number % len(batches)]
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = _time_step(steps[name], batch, workload.device)
            if number >= 0:
                times[name].append(seconds)
    if not times[names[0]]:
        return {}
    return {name: _summarize(times[name], times[names[0]]) for name in names}


def _new_step(method: Method, workload: Workload, config: TrainConfig) -> Step:
    return make_step(method, workload, seeded_model(workload, 0), config)[1]


def _enough(rounds: int, seconds: float, requested: int | None) -> bool:
    if requested is not None:
        return rounds >= requested
    return (
        rounds >= _MAX_ROUNDS
        or (rounds >= _MIN_ROUNDS and seconds >= _MIN_SECONDS)
        or (rounds >= _FEW_ROUNDS and seconds >= _MAX_SECONDS)
    )


def _time_step(step: Step, batch: Batch, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step(batch)
    synchronize(device)
    return time.perf_counter() - start


def _summarize(times: list[float], yardstick: list[float]) -> StepCost:
    ratios = [a / b for a, b in zip(times, yardstick, strict=True)]
    # statistics.quantiles needs two values.
    q1, median, q3 = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return StepCost(q1, median, q3, len(ratios), 1e3 * statistics.median(times))
