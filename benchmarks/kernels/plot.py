"""Every contestant's time as a multiple of ksam's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.errors import import_optional
from benchmarks.kernels.case import KSAM, label_of
from benchmarks.kernels.measure import Row

# Okabe and Ito's colors, told apart with any color vision; the markers serve black and white.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))

_INCHES_PER_CASE = 0.21


def require_matplotlib() -> None:
    """Fail now, rather than after minutes of measuring, if there is no matplotlib."""
    import_optional("matplotlib", package="matplotlib", needed_by="the plot")


def plot_ratios(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw a panel per room: a line per case, a mark per contestant, on a logarithmic axis."""
    # A bare Figure draws to files without pyplot's choice of a screen.
    from matplotlib.figure import Figure

    rooms = {name: [row for row in rows if row.room == name] for name in _names(rows, "room")}
    columns = _two_columns({name: len(_labels(own)) for name, own in rooms.items()})
    heights = [sum(len(_labels(rooms[name])) + 6 for name in column) for column in columns]
    figure = Figure(figsize=(7.5 * len(columns), 1 + _INCHES_PER_CASE * max(heights)))
    figure.suptitle(title, fontsize=11)
    figure.set_layout_engine("constrained")
    for subfigure, column in zip(
        figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        panels = subfigure.subplots(
            len(column), 1, squeeze=False, height_ratios=[len(_labels(rooms[n])) for n in column]
        )[:, 0]
        for axes, name in zip(panels, column, strict=True):
            _draw_room(axes, name, rooms[name])
    figure.savefig(path, dpi=130)


def _draw_room(axes: Any, name: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    labels = _labels(rows)
    places = {label: place for place, label in enumerate(labels)}
    contestants = [c for c in _names(rows, "contestant") if c != KSAM]
    for contestant, (color, marker) in zip(contestants, cycle(_STYLES), strict=False):
        own = [row for row in rows if row.contestant == contestant and row.ratio is not None]
        axes.scatter(
            [row.ratio for row in own],
            [places[_label(row)] for row in own],
            color=color,
            marker=marker,
            s=22,
            alpha=0.85,
            label=contestant,
        )
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log", subs=range(2, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())  # labels in between would touch
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first case on top
    axes.grid(alpha=0.3)
    axes.set_title(name, fontsize=10, loc="left", x=-0.02, ha="right")  # above the cases' names
    axes.set_xlabel("time / ksam's time (right of the line: ksam is faster)", fontsize=8)
    if contestants:
        # Above the panel, where it hides no mark.
        axes.legend(
            fontsize=7,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(contestants),
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1,
            handletextpad=0,
        )


def _label(row: Row) -> str:
    return f"{label_of(row.operation, row.extra)}  {row.shape}  {row.dtype}"


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(map(_label, rows)))


def _names(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, column) for row in rows))


def _two_columns(sizes: dict[str, int]) -> list[list[str]]:
    """Rooms in two columns of about the same height, or in one if there is only one room."""
    left: list[str] = []
    right: list[str] = []
    for name in sizes:
        filled = [sum(sizes[n] for n in column) for column in (left, right)]
        (left if filled[0] <= filled[1] else right).append(name)
    return [column for column in (left, right) if column]
