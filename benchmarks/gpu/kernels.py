"""Times of every operation and its rivals on the GPU: graphs over inputs that no cache holds.

A contestant's graph calls it on every input of a pool, outputs kept apart, so that more than twice
the L2 cache goes by before an address comes again (where `working_set_bytes` says less, the inputs
stay cached: losses, and lists of small tensors). The contestants of a case take turns in one
process, each for some milliseconds a round, and with them a copy that moves as many bytes as the
case must: a small one is nowhere near the bandwidth of a large copy. What waits for the GPU fits in
no graph and is timed as it runs, with the gaps between its launches: its `mode` is "eager".
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.environment import last_level_cache_bytes, synchronize
from benchmarks.gpu.capture import capture, seconds_of
from benchmarks.gpu.cases import kernel_cases
from benchmarks.gpu.part import Context, PartFile, reason
from benchmarks.gpu.sync import waiting_is_an_error
from benchmarks.kernels.case import KSAM, Case, Run, label_of
from benchmarks.kernels.measure import backend_in_force, figures_of, row_of, start_all
from benchmarks.timing import Plan, Quartiles, ratios, rotated
from ksam_kernels import BackendUnavailableError

_PLAN = Plan(rounds=15, seconds=0.8, few_rounds=7, max_seconds=3.0, max_rounds=60)
_DRY_PLAN = Plan(rounds=2, seconds=0, few_rounds=1, max_seconds=1)
# Launching a graph leaves a gap of some microseconds, so a graph lasts a millisecond.
_GRAPH_SECONDS, _SAMPLE_SECONDS = 1e-3, 3e-3
_MAX_REPEATS = 500
_CACHES = 2
_COPY = "a copy of the same size"  # among the contestants while they are timed
_MAX_POOL, _MAX_STATEFUL_POOL = 256, 4

Rows = list[dict[str, Any]]


def pool_size(case: Case, cache_bytes: int) -> int:
    """How many inputs it takes for their calls to move more than twice the cache; two at least."""
    most = _MAX_STATEFUL_POOL if case.stateful else _MAX_POOL
    return min(max(_CACHES * cache_bytes // case.floor_bytes + 1, 2), most)


@dataclasses.dataclass
class Timed:
    """A contestant's calls on its whole pool: how they are made, and how often in a sample."""

    replay: Callable[[], object]
    mode: str
    passes: int  # over the pool, in a replay
    replays: int = 1


def timed(work: Callable[[], object], device: torch.device) -> Timed:
    """How to time `work`, a pass over the pool: in a graph if it can be, repeated for a sample."""
    if device.type != "cuda":
        return Timed(work, "cpu", 1)
    try:
        with waiting_is_an_error(device):  # a capture that fails leaves the generators unusable
            work()
    except RuntimeError:
        found = Timed(work, "eager", 1)
    else:
        found = _in_graph(work, device)
    once = _seconds_of_one(found, device)
    found.replays = min(max(1, round(_SAMPLE_SECONDS / once)), _MAX_REPEATS)
    return found


def _in_graph(work: Callable[[], object], device: torch.device) -> Timed:
    one = Timed(capture(work, device), "graph", 1)
    passes = min(round(_GRAPH_SECONDS / _seconds_of_one(one, device)), _MAX_REPEATS)
    if passes <= 1:
        return one

    def repeated() -> None:
        for _ in range(passes):
            work()

    return Timed(capture(repeated, device), "graph", passes)


def _seconds_of_one(timed: Timed, device: torch.device) -> float:
    timed.replay()
    synchronize(device)
    return max(seconds_of(timed.replay, 1, device), 1e-7)


def rounds_of(
    contestants: dict[str, Timed], calls: int, plan: Plan, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one number a round; `calls`: in a pass over the pool."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for number in itertools.count():
        if plan.done(number, time.perf_counter() - start):
            break
        for name in rotated(names, number):
            own = contestants[name]
            seconds = seconds_of(own.replay, own.replays, device)
            times[name].append(seconds / (own.replays * own.passes * calls))
    return times


def _passes(case: Case, runs: dict[str, Run], pool: list[Any]) -> dict[str, Callable[[], object]]:
    """Every contestant's pass over the pool, which keeps its results until the end.

    Contestants with a state have one of their own for each input.
    """

    def over(runs_by_input: list[Run]) -> Callable[[], object]:
        pairs = list(zip(runs_by_input, pool, strict=True))
        return lambda: [run(input) for run, input in pairs]

    passes = {}
    for contestant in case.contestants:
        run = runs.get(contestant.name)
        if run is not None and case.stateful:
            passes[contestant.name] = over([run, *map(contestant.start, pool[1:])])
        elif run is not None:
            passes[contestant.name] = over([run] * len(pool))
    return passes


def _copies(case: Case, count: int, device: torch.device) -> Callable[[], object]:
    """A copy for each input, reading and writing as many bytes together as the case must move."""
    size = case.floor_bytes // 2
    pairs = [
        [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        for _ in range(count)
    ]
    return lambda: [target.copy_(source) for source, target in pairs]


def measure(case: Case, device: torch.device, plan: Plan, bandwidth: float) -> Rows:
    """A row for each contestant, ksam's first: where a rival disagrees, ksam's may be wrong."""
    try:
        backend = backend_in_force(case, device)
    except BackendUnavailableError as error:
        return [dataclasses.asdict(row_of(case, case.contestants[0], "", note=str(error)))]
    torch.manual_seed(0)
    cache = last_level_cache_bytes(device) if device.type == "cuda" else 0
    with torch.set_grad_enabled(case.needs_grad):
        first = case.make_input()
        started = start_all(case, first, quick=False, keep_going=True)
        more = pool_size(case, cache) - 1
        pool = [first, *(case.make_input() for _ in range(more))]
        contestants = {
            name: timed(work, device) for name, work in _passes(case, started.runs, pool).items()
        }
        contestants[_COPY] = timed(_copies(case, len(pool), device), device)
        times = rounds_of(contestants, len(pool), plan, device)
    rows = []
    for contestant in case.contestants:
        name = contestant.name
        label = backend if name == KSAM else "torch"
        if name in started.reasons:
            row = dataclasses.asdict(row_of(case, contestant, label, note=started.reasons[name]))
        else:
            figures = figures_of(case, times[name], times[KSAM], bandwidth)
            row = dataclasses.asdict(row_of(case, contestant, label, **figures))
            row["mode"] = contestants[name].mode
            row["working_set_bytes"] = len(pool) * case.floor_bytes
        rows.append(row)
    rows[0]["share_of_equal_copy"] = statistics.median(ratios(times[_COPY], times[KSAM]))
    if started.disagree:
        rows[0]["failure"] = "; ".join(started.reasons[name] for name in started.disagree)
    return rows


def copy_bandwidth(context: Context) -> Quartiles:
    """Bytes per second of `Tensor.copy_` between large tensors, reads and writes counted."""
    device = context.device
    source = torch.randn(1 << (10 if context.dry_run else 28), device=device)
    target = torch.empty_like(source)
    size = 2 * source.numel() * source.element_size()
    start = time.perf_counter()
    while time.perf_counter() - start < (0 if context.dry_run else 0.5):  # clocks settle
        seconds_of(lambda: target.copy_(source), 4, device)
    return Quartiles.of(
        [4 * size / seconds_of(lambda: target.copy_(source), 4, device) for _ in range(25)]
    )


def name_of(row: dict[str, Any]) -> str:
    """A case by its row, or a row-like dictionary."""
    return f"{label_of(row['operation'], row['extra'])} {row['shape']} {row['dtype']}"


def _line(rows: Rows) -> str:
    cells = []
    for row in rows:
        time = row["microseconds"]
        cells.append(f"{row['contestant']} {time['median']:.1f}" if time else row["contestant"])
    ours = rows[0]
    share = ours["share_of_copy"]
    of_copy = f"{100 * share:.0f} % of copy" if share else ours["note"]
    if "share_of_equal_copy" in ours:
        of_copy += f", {100 * ours['share_of_equal_copy']:.0f} % of one as large"
    failure = f"; FAILED: {ours['failure']}" if "failure" in ours else ""
    return f"{name_of(ours)} [{ours['backend']}]: {of_copy}; us: {', '.join(cells)}{failure}"


def run(context: Context, file: PartFile) -> None:
    """All cases, as far as the time goes; those that an earlier run measured are kept."""
    cases = list(kernel_cases(context.device, tiny=context.dry_run))
    found = _measured_before(cases, file)
    before = copy_bandwidth(context)
    print(f"copy: {before.median / 1e9:.0f} GB/s", flush=True)
    plan = _DRY_PLAN if context.dry_run else _PLAN
    file.results = {"copy_bytes_per_second": {"before": vars(before)}, **_summary(found)}
    for name, case in zip(found, cases, strict=True):
        to_do = not found[name] or "failure" in found[name][0]
        if to_do and context.seconds_left >= 8:
            found[name] = _measured(case, context.device, plan, before.median)
            file.results |= _summary(found)
            file.write(complete=False)
        if found[name]:
            print(_line(found[name]), flush=True)
    file.results["copy_bytes_per_second"]["after"] = vars(copy_bandwidth(context))


def _measured_before(cases: list[Case], file: PartFile) -> dict[str, Rows]:
    """Rows by case, in the order of the cases; none where there is nothing yet."""
    found: dict[str, Rows] = {f"{case.label} {case.shape} {case.dtype}": [] for case in cases}
    for row in file.unfinished().get("rows", []):
        if name_of(row) in found:
            found[name_of(row)].append(row)
    return found


def _measured(case: Case, device: torch.device, plan: Plan, bandwidth: float) -> Rows:
    """The case's rows; if it fails, only ksam's, which says so."""
    try:
        return measure(case, device, plan, bandwidth)
    except Exception as error:
        row = dataclasses.asdict(row_of(case, case.contestants[0], "", note="failed"))
        return [{**row, "failure": reason(error)}]


def _summary(found: dict[str, Rows]) -> dict[str, Any]:
    first = {name: rows[0] for name, rows in found.items() if rows}
    return {
        "failures": {name: row["failure"] for name, row in first.items() if "failure" in row},
        "left_out": [name for name, rows in found.items() if not rows],
        "rows": [row for rows in found.values() for row in rows],
    }
