"""The benchmark's figures: what the runs and the step timing come to, per method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.train.loop import EpochResult
from benchmarks.train.methods import Method
from benchmarks.train.step_cost import StepCost


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1); one value has none."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class MethodSummary:
    """A method's figures over its seeds, after the last epoch."""

    method: Method
    accuracy: Spread  # share of the test set, 0 to 1
    seconds: Spread  # of training
    runs: int
    non_finite_runs: int  # runs that had a NaN or infinite training loss in any epoch
    cost: StepCost | None  # None: not measured
    theory: float  # cost of a step over the base optimizer's
    gain: Spread | None  # accuracy over the base's of the same seed, its sd the standard error


def _gain(results: Sequence[EpochResult], base: dict[int, float]) -> Spread | None:
    """Mean of the paired differences and its standard error; None without a pair."""
    pairs = [r.test_accuracy - base[r.seed] for r in results if r.seed in base]
    if not pairs:
        return None
    spread = Spread.of(pairs)
    return Spread(spread.mean, None if spread.sd is None else spread.sd / len(pairs) ** 0.5)


def _last(results: Sequence[EpochResult]) -> list[EpochResult]:
    """The results of a method's last epoch, one a seed."""
    last = max((result.epoch for result in results), default=0)
    return [result for result in results if result.epoch == last]


def summarize(
    methods: Sequence[Method],
    results: Sequence[EpochResult],
    costs: dict[str, StepCost],
    batch_size: int,
) -> list[MethodSummary]:
    """Return one summary a method, in the order of `methods`."""
    base = {r.seed: r.test_accuracy for r in _last([r for r in results if r.method == "sgd"])}
    summaries = []
    for method in methods:
        own = [result for result in results if result.method == method.name]
        last = _last(own)
        summaries.append(
            MethodSummary(
                method=method,
                accuracy=Spread.of([result.test_accuracy for result in last]),
                seconds=Spread.of([result.train_seconds for result in last]),
                runs=len(last),
                non_finite_runs=len({result.seed for result in own if not result.finite}),
                cost=costs.get(method.name),
                theory=method.theoretical_cost(batch_size),
                gain=_gain(last, {} if method.is_base else base),
            )
        )
    return summaries
