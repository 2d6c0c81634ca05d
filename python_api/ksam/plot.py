"""A run's diagnostics on one page."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksam.writers import Row

# Okabe and Ito's colors, told apart with any color vision.
_BLUE, _RED = "#0072B2", "#D55E00"
_BINS = 24


def _figure() -> Any:
    """A bare figure, which draws to files without pyplot choosing a screen."""
    try:
        module: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("plots need the package matplotlib (pip install matplotlib)") from error
    return module.Figure(figsize=(11.0, 6.0), layout="constrained")


#: Column of the rows: title of its panel.
PANELS = {
    "loss": "loss of the batch",
    "share": "gradient bounds that the selection carries",
    "sharp": "sharpness-aware steps",
    "alignment": "cosine of the selection's gradient and the batch's",
    "cost": "cost of a step, in plain steps",
}


def draw(
    path: str | Path,
    rows: Sequence[Row],
    counts: tuple[Tensor, Tensor] | None,
    highlight: Tensor | None,
) -> None:
    """Draw the columns of the rows over the steps, and how often samples were selected.

    Args:
        path: of the image; its suffix decides the format.
        rows: as :class:`ksam.Diagnostics` writes them.
        counts: how often each sample was seen and selected, int64 ``[dataset_size]`` both.
        highlight: indices of samples to set apart from the others, int64.
    """
    figure = _figure()
    axes = figure.subplots(2, 3).flatten()
    steps = [row["step"] for row in rows]
    for axis, (name, title) in zip(axes, PANELS.items(), strict=False):
        axis.plot(steps, [row[name] for row in rows], color=_BLUE, marker=".", ms=3, lw=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if name in ("share", "sharp"):
            axis.set_ylim(-0.02, 1.02)
    _draw_counts(axes[-1], counts, highlight)
    figure.savefig(path, dpi=150)


def _draw_counts(axis: Any, counts: tuple[Tensor, Tensor] | None, highlight: Tensor | None) -> None:
    axis.set_title("times selected per time seen", fontsize=9)
    if counts is None:
        axis.text(0.5, 0.5, "not counted: dataset_size was not given", ha="center", va="center")
        axis.set_axis_off()
        return
    seen, selected = (count.cpu() for count in counts)
    rate = selected / seen.clamp_min(1)
    marked = torch.zeros(len(rate), dtype=torch.bool)
    if highlight is not None:
        marked[highlight.cpu()] = True
    groups = [("others" if marked.any() else "all", rate[~marked & (seen > 0)], _BLUE)]
    if marked.any():
        groups.append(("highlighted", rate[marked & (seen > 0)], _RED))
    most = max(1.0, float(rate.max())) if len(rate) else 1.0  # with replacement, above 1
    for label, rates, color in groups:
        if len(rates) == 0:
            continue
        share = torch.ones(len(rates)) / len(rates)
        text = f"{label}: {len(rates)}, mean {rates.mean():.2f}"
        options = {"bins": _BINS, "range": (0, most), "alpha": 0.6, "color": color}
        axis.hist(rates.tolist(), weights=share.tolist(), label=text, **options)
    axis.set_xlabel("selected / seen")
    axis.set_ylabel("share of the samples")
    if axis.get_legend_handles_labels()[0]:  # none before the first step
        axis.legend(fontsize=8)
