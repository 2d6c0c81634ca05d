"""One case measured: agreement first, then the times, as the report's rows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.environment import preemptions
from benchmarks.kernels.case import (
    KSAM,
    Case,
    Contestant,
    DisagreementError,
    Run,
    UnavailableError,
    size_in_bytes,
)
from benchmarks.kernels.timing import pool_size, time_in_turns
from benchmarks.timing import Plan, Quartiles, ratios
from ksam_kernels import BackendUnavailableError, backends


@dataclass(frozen=True)
class Row:
    """A contestant's figures on a case; the times are None where it could not run, see `note`."""

    room: str
    operation: str
    shape: str
    dtype: str
    extra: str
    contestant: str
    backend: str  # ksam's; "torch" for the others
    floor_bytes: int
    microseconds: Quartiles | None = None  # per call, over rounds
    rounds: int = 0
    share_of_copy: float | None = None  # floor bytes per second over the bandwidth of a copy
    ratio: float | None = None  # time over ksam's, the median of the ratios within rounds
    preemptions_per_s: float | None = None  # during the whole case
    note: str = ""


def measure_case(
    case: Case, device: torch.device, plan: Plan, bandwidth: float, *, quick: bool
) -> list[Row]:
    """Check that all contestants agree and time them; return a row for each, ksam's first.

    Args:
        bandwidth: bytes per second of a copy.

    Raises:
        DisagreementError: a contestant computes something else than ksam.
    """
    try:
        backend = backend_in_force(case, device)
    except BackendUnavailableError as error:
        return [row_of(case, contestant, "", note=str(error)) for contestant in case.contestants]
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.needs_grad):
        first = case.make_input()
        started = start_all(case, first, quick=quick)
        # The first input comes last: the check has just brought it into the caches.
        more = 0 if case.stateful else pool_size(size_in_bytes(first), device) - 1
        pool = [*(case.make_input() for _ in range(more)), first]
        before, start = preemptions(), time.perf_counter()
        times = time_in_turns(started.runs, pool, plan, device)
        after, seconds = preemptions(), time.perf_counter() - start
    rate = None if before is None or after is None else (after - before) / seconds
    rows = []
    for contestant in case.contestants:
        name = contestant.name
        row_backend = backend if name == KSAM else "torch"
        if name in started.reasons:
            rows.append(row_of(case, contestant, row_backend, note=started.reasons[name]))
        else:
            figures = figures_of(case, times[name], times[KSAM], bandwidth)
            rows.append(row_of(case, contestant, row_backend, **figures, preemptions_per_s=rate))
    return rows


def backend_in_force(case: Case, device: torch.device) -> str:
    """The backend behind ksam's contestant, joined by + where its operators have different ones.

    Raises:
        BackendUnavailableError: the backend asked for by name cannot run the case.
    """
    names = dict.fromkeys(backends.resolve(operator, device)[0] for operator in case.operators)
    return "+".join(names)


@dataclass
class Started:
    """The contestants that can run, why the others cannot, and which of the others disagree."""

    runs: dict[str, Run] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    disagree: list[str] = field(default_factory=list)


def start_all(case: Case, input: object, *, quick: bool, keep_going: bool = False) -> Started:
    """Start every contestant and compare what it makes of the first input with ksam's result.

    Args:
        keep_going: a rival that fails or disagrees is left out instead of ending everything.
    """
    started = Started()
    expected = None
    for contestant in case.contestants:
        name = contestant.name
        if quick and contestant.starts_slowly:
            started.reasons[name] = "left out by --quick"
            continue
        tolerated = (DisagreementError, RuntimeError) if keep_going and name != KSAM else ()
        try:
            run = contestant.start(input)
            result = run(input)
            if name == KSAM:
                expected = result
            else:
                case.check_agreement(contestant, result, expected, input)
            started.runs[name] = run
        except UnavailableError as error:
            started.reasons[name] = str(error)
        except tolerated as error:
            started.reasons[name] = str(error).strip().partition("\n")[0]
            if isinstance(error, DisagreementError):
                started.disagree.append(name)
    return started


def row_of(case: Case, contestant: Contestant, backend: str, **figures: Any) -> Row:
    """The row of a contestant: what it is, and its figures."""
    return Row(
        room=case.room,
        operation=case.operation,
        shape=case.shape,
        dtype=case.dtype,
        extra=case.extra,
        contestant=contestant.name,
        backend=backend,
        floor_bytes=case.floor_bytes,
        **figures,
    )


def figures_of(
    case: Case, times: list[float], yardstick: list[float], bandwidth: float
) -> dict[str, Any]:
    """Figures from seconds per call, one number a round; `yardstick`: ksam's in these rounds."""
    microseconds = Quartiles.of([1e6 * seconds for seconds in times])
    return {
        "microseconds": microseconds,
        "rounds": len(times),
        "share_of_copy": case.floor_bytes / (1e-6 * microseconds.median) / bandwidth,
        "ratio": statistics.median(ratios(times, yardstick)),
    }
