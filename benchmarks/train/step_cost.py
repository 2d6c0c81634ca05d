"""Cost of a step relative to the base optimizer's, measured side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

from benchmarks.timing import Plan, Quartiles, ratios, rotated, seconds_for
from benchmarks.train.config import TrainConfig
from benchmarks.train.loop import data_generator, seeded_model
from benchmarks.train.methods import Method
from benchmarks.train.steps import Step, make_step
from benchmarks.train.workload import Workload

_WARMUP_ROUNDS = 3
_BATCHES = 8

# Where the number of rounds is not given: enough for steady quartiles, but not all day where a
# step takes seconds.
_STEADY = Plan(rounds=15, seconds=15.0, few_rounds=5, max_seconds=60.0, max_rounds=1000)


@dataclass(frozen=True)
class StepCost:
    """A step's time, and its ratios to that of the base optimizer's step in the same round."""

    ratio: Quartiles
    rounds: int
    milliseconds: float  # median time of a step


def measure_step_costs(
    workload: Workload, methods: list[Method], config: TrainConfig
) -> dict[str, StepCost]:
    """Time single steps of all methods in turn; return their costs by the method's name.

    Args:
        methods: the first one is the yardstick, the base optimizer alone. Those whose steps are not
            all alike are left out: their first steps need not cost what later ones do.
        config: with `timing_rounds` 0 there are no costs, just a few steps of each method to warm
            up the libraries for what is timed next.

    A round gives every method one step on the same batch, and the ratios are taken within rounds:
    what else the machine is doing slows all of a round's steps alike. The order rotates, so that
    none of them always runs in the caches that the same other one left behind.
    """
    batches = list(
        itertools.islice(workload.train_batches(config.batch_size, data_generator(0)), _BATCHES)
    )
    steps = {m.name: _new_step(m, workload, config) for m in methods if m.is_uniform}
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    plan, start = _plan(config.timing_rounds), time.perf_counter()
    for number in itertools.count(-_WARMUP_ROUNDS):
        if number == 0:
            start = time.perf_counter()
        if plan.done(number, time.perf_counter() - start):
            break
        batch = batches[number % len(batches)]
        for name in rotated(names, number):
            seconds = seconds_for(steps[name], [batch], workload.device)
            if number >= 0:
                times[name].append(seconds)
    if not times[names[0]]:
        return {}
    return {name: _summarize(times[name], times[names[0]]) for name in names}


def _new_step(method: Method, workload: Workload, config: TrainConfig) -> Step:
    return make_step(method, workload, seeded_model(workload, 0), config)[1]


def _plan(requested: int | None) -> Plan:
    if requested is None:
        return _STEADY
    return Plan(requested, 0.0, requested, 0.0, max_rounds=requested)


def _summarize(times: list[float], yardstick: list[float]) -> StepCost:
    ratio = Quartiles.of(ratios(times, yardstick))
    return StepCost(ratio, len(times), 1e3 * statistics.median(times))
