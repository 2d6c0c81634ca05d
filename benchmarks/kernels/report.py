"""The figures as tables on the screen, a line per case, and as CSV and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import device_name
from benchmarks.kernels.case import KSAM, Case
from benchmarks.kernels.measure import Row
from benchmarks.results_file import ResultsFile
from benchmarks.timing import Quartiles

COLUMNS = (
    "room", "operation", "shape", "dtype", "extra", "contestant", "backend", "threads",
    "median_us", "q25_us", "q75_us", "rounds", "floor_bytes", "share_of_copy", "ratio",
    "preemptions_per_s", "note", "torch", "device", "timestamp",
)  # fmt: skip


# Threads that wait for each other spin: where one of them has lost its core to another process, a
# call of microseconds takes a time slice of milliseconds, and not every contestant uses threads.
_MANY_PREEMPTIONS = 100.0  # per second; quiet machines stay below 50


def is_disturbed(row: Row) -> bool:
    """Whether other processes kept taking the CPU while the row's case was measured."""
    return (row.preemptions_per_s or 0.0) > _MANY_PREEMPTIONS


def is_spread(times: Quartiles) -> bool:
    """Whether the quartiles are so far apart that the median is no one's time."""
    return times.q75 > 1.5 * times.q25


class KernelResults(ResultsFile):
    """results.csv, a row per case and contestant, written as the cases are measured.

    Times are microseconds per call; `ratio` is the contestant's time over ksam's. Figures are empty
    where a contestant could not run, and `note` says why.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        constant = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": device_name(device),
        }
        super().__init__(path, COLUMNS, constant)

    def write(self, rows: Sequence[Row]) -> None:
        """Append the rows of a case; they are on disk when this returns."""
        self.append(*map(_csv_row, rows))


def _csv_row(row: Row) -> dict[str, Any]:
    figures = dataclasses.asdict(row)
    times = figures.pop("microseconds")
    quartiles = {f"{name}_us": value for name, value in times.items()} if times else {}
    return {**figures, **quartiles}


def write_summary(path: Path, facts: dict[str, Any]) -> None:
    """Write the facts about the run as JSON; its rows are in the CSV."""
    path.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class Table:
    """A room's table, printed line by line as its cases are measured.

    Its columns are known beforehand from the cases: what they are, ksam's figures, and the times of
    every other contestant of the room, in the given order, as multiples of ksam's.
    """

    def __init__(self, cases: Sequence[Case], order: Sequence[str]) -> None:
        names = {c.name for case in cases for c in case.contestants}
        self._others = [name for name in order if name in names]
        self._notes: dict[str, int] = {}
        descriptions = [("operation", "shape", "dtype"), *map(_describe, cases)]
        self._widths = [max(map(len, column)) for column in zip(*descriptions, strict=True)]
        self._widths += [9, 10, 5, *(max(len(name), 8) for name in self._others)]

    def header(self) -> str:
        """Return the two lines above the rows."""
        titles = ["operation", "shape", "dtype", "backend", "ksam [us]", "copy", *self._others]
        line = self._align(titles)
        return f"{line}\n{'-' * len(line)}"

    def line(self, case: Case, rows: Sequence[Row]) -> str:
        """Return a case's line."""
        by_name = {row.contestant: row for row in rows}
        ksam = by_name[KSAM]
        cells = [*_describe(case), ksam.backend]
        if ksam.microseconds is None or ksam.share_of_copy is None:
            return self._align([*cells, self._reference(ksam.note)])
        mark = "~" if is_disturbed(ksam) else " "
        time = _format_time(ksam.microseconds.median) + mark
        cells += [time, _format_share(ksam.share_of_copy)]
        cells += [self._cell(by_name.get(name)) for name in self._others]
        return self._align(cells)

    def notes(self, legend: dict[str, str]) -> list[str]:
        """Return what the columns are, and the reasons that lines refer to by number."""
        return [
            *(f"{name}: {legend[name]}" for name in self._others),
            *(f"[{number}] {note}" for note, number in self._notes.items()),
        ]

    def _cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        if row.ratio is None or row.microseconds is None:
            return self._reference(row.note)
        return format_ratio(row.ratio) + ("~" if is_spread(row.microseconds) else " ")

    def _reference(self, note: str) -> str:
        return f"- [{self._notes.setdefault(note, len(self._notes) + 1)}]"

    def _align(self, cells: Sequence[str]) -> str:
        """Words to the left, figures to the right."""
        words = 4
        widths = self._widths[: len(cells)]
        aligned = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()


def format_ratio(ratio: float) -> str:
    """Two decimals, and a star where ksam is the slower one."""
    return f"{ratio:.2f}{'*' if round(ratio, 2) < 1 else ' '}"


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Return how often ksam is the slower one, and how many cases to trust less."""
    lines = []
    for name in dict.fromkeys(row.contestant for row in rows if row.contestant != KSAM):
        own = [row.ratio for row in rows if row.contestant == name and row.ratio is not None]
        if own:
            slower = sum(round(ratio, 2) < 1 for ratio in own)
            lines.append(f"{name}: ksam is slower in {slower} of {len(own)} cases")
    measured = [row for row in rows if row.contestant == KSAM and row.ratio is not None]
    disturbed = sum(map(is_disturbed, measured))
    if disturbed:
        lines.append(f"~ other processes disturbed {disturbed} of {len(measured)} cases: repeat")
    return lines


def _describe(case: Case) -> tuple[str, str, str]:
    return case.label, case.shape, case.dtype


def _format_share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def _format_time(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 1000 else f"{microseconds:,.0f}"
