"""The whole benchmark: measure every case, print as it goes, write the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.arguments import results_folder
from benchmarks.environment import (
    describe_environment,
    device_name,
    package_version,
)
from benchmarks.errors import UsageError
from benchmarks.kernels import compact, loss, perturb, topk
from benchmarks.kernels.case import Case
from benchmarks.kernels.measure import Row, measure_case
from benchmarks.kernels.plot import plot_ratios, require_matplotlib
from benchmarks.kernels.report import KernelResults, Table, summary_lines, write_summary
from benchmarks.kernels.timing import DEFAULT_PLAN, QUICK_PLAN, copy_bandwidth

ROOMS = ("loss", "topk", "compact", "perturb")

# section: (its cases, what its contestants are). The host's share of a call is a section of its own
# and comes with the perturb room.
_SECTIONS: dict[str, tuple[Callable[[torch.device], Iterator[Case]], dict[str, str]]] = {
    "loss": (loss.cases, loss.LEGEND),
    "topk": (topk.cases, topk.LEGEND),
    "compact": (compact.cases, compact.LEGEND),
    "perturb": (perturb.cases, perturb.LEGEND),
    "host": (perturb.host_cases, perturb.LEGEND),
}

_HOST_TITLE = "host: microseconds a call takes whatever the size, on tensors of one element"


@dataclass(frozen=True)
class Settings:
    """What to measure and where to write it."""

    rooms: tuple[str, ...]
    quick: bool
    backend: str  # as asked for
    out: Path  # the folder of results.csv, summary.json and ratios.png


def run_benchmark(settings: Settings, device: torch.device) -> None:
    """Measure the rooms, print a table for each, and write CSV, JSON and the plot."""
    require_matplotlib()
    with results_folder(settings.out, stale=("summary.json", "ratios.png")):
        _run(settings, device)


def _run(settings: Settings, device: torch.device) -> None:
    paths = [settings.out / name for name in ("results.csv", "summary.json", "ratios.png")]
    results_path, summary_path, plot_path = paths
    environment = describe_environment(device)
    bandwidth = copy_bandwidth(device)
    print(_describe(settings, device, bandwidth), flush=True)
    rows: list[Row] = []
    with KernelResults(results_path, device) as results_file:
        for section in _sections(settings.rooms):
            for case_rows in _measure_section(section, settings, device, bandwidth):
                results_file.write(case_rows)
                rows += case_rows
    if all(row.microseconds is None for row in rows):
        raise UsageError(f"nothing could be measured: {rows[0].note}")
    bandwidth_after = copy_bandwidth(device)
    facts = {
        "environment": environment,
        "pytorch_optimizer": package_version("pytorch-optimizer"),
        "backend_asked_for": settings.backend,
        "quick": settings.quick,
        "copy_bytes_per_second": {"before": bandwidth, "after": bandwidth_after},
    }
    write_summary(summary_path, facts)
    plot_ratios(plot_path, rows, f"{device_name(device)}, torch {torch.__version__}")
    print("", *summary_lines(rows), sep="\n")
    print(f"copy bandwidth after the run: {_gigabytes(bandwidth_after)}\n")
    print("\n".join(f"wrote {path}" for path in paths))


def _describe(settings: Settings, device: torch.device, bandwidth: float) -> str:
    """Return what the tables need to be understood, for the screen."""
    return (
        f"{device_name(device)}, torch {torch.__version__}, backend {settings.backend}\n"
        f"ksam: median time of a call; copy: the bytes it must move at least over that time, as a\n"
        f"share of the bandwidth of a copy, {_gigabytes(bandwidth)} (caches can exceed it).\n"
        "Other columns: times in multiples of ksam's, * where ksam is the slower one.\n"
        "~: other processes kept taking the CPU, which can make a row meaningless; by a ratio:\n"
        "the quartiles of its time are more than 1.5 apart."
    )


def _sections(rooms: tuple[str, ...]) -> Iterator[str]:
    for room in ROOMS:
        if room in rooms:
            yield room
    if "perturb" in rooms:
        yield "host"


def _measure_section(
    section: str, settings: Settings, device: torch.device, bandwidth: float
) -> Iterator[list[Row]]:
    """Print the section's table line by line; yield the rows of one case after the other."""
    make_cases, legend = _SECTIONS[section]
    cases = [case for case in make_cases(device) if case.quick or not settings.quick]
    plan = QUICK_PLAN if settings.quick else DEFAULT_PLAN
    table = Table(cases, list(legend))
    title = _HOST_TITLE if section == "host" else section
    print(f"\n{title}\n{table.header()}", flush=True)
    for case in cases:
        rows = measure_case(case, device, plan, bandwidth, quick=settings.quick)
        print(table.line(case, rows), flush=True)
        yield rows
    print("\n".join(table.notes(legend)), flush=True)


def _gigabytes(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"
