"""The benchmark's figures as files and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe_environment
from benchmarks.results_file import ResultsFile
from benchmarks.train.config import TrainConfig
from benchmarks.train.loop import EpochResult
from benchmarks.train.methods import BASE_LABELS, Method
from benchmarks.train.summary import MethodSummary, Spread
from ksam.selection import subset_size

COLUMNS = (
    "data", "model", "base", "method", "k", "rho", "batch_size", "lr", "weight_decay", "seed",
    "epoch", "train_seconds", "gradient_cost", "train_loss", "test_accuracy", "torch", "device",
    "timestamp",
)  # fmt: skip


class TrainResults(ResultsFile):
    """results.csv, a row per method, seed and epoch, written as the runs go.

    `train_seconds` counts from the start of a run, `test_accuracy` is a share from 0 to 1; `k` and
    `rho` are empty where the method has none; `gradient_cost` is the mean cost of a step by count.
    """

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        device: str,
        kept: Sequence[dict[str, Any]] = (),
    ) -> None:
        constant = {
            "data": config.data,
            "model": config.model_label,
            "base": config.base,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "torch": torch.__version__,
            "device": device,
        }
        super().__init__(path, COLUMNS, constant, kept)

    def write(self, method: Method, result: EpochResult) -> None:
        """Append a row; it is on disk when this returns."""
        method_figures = {
            "k": "" if method.k is None else method.k,
            "rho": "" if method.rho is None else method.rho,
        }
        self.append({**dataclasses.asdict(result), **method_figures})


def write_summary(
    path: Path, config: TrainConfig, summaries: Sequence[MethodSummary], device: torch.device
) -> None:
    """Write the table's figures with the settings behind them as JSON."""
    content: dict[str, Any] = {
        "settings": dataclasses.asdict(config),
        **describe_environment(device),
        "methods": [dataclasses.asdict(summary) for summary in summaries],
    }
    for entry in content["methods"]:
        del entry["method"]["config"]  # the settings above
    # Paths as strings. No figure can be NaN or infinite, which JSON lacks.
    text = json.dumps(content, indent=2, default=str, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def format_table(config: TrainConfig, summaries: Sequence[MethodSummary], batch_size: int) -> str:
    """Return the table of the figures, with notes below it.

    Args:
        batch_size: samples in a full batch, M of the notes.
    """
    base = BASE_LABELS[config.base]
    header = (
        "method", "runs", "test accuracy [%]", f"over {base}, paired", "training time [s]",
        f"step cost [x {base}]", "theory",
    )  # fmt: skip
    rows = [header, *(_table_row(summary) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [_align(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_notes(config, summaries, batch_size)])


def describe(config: TrainConfig, device: str) -> str:
    """Return the settings on two lines, for the screen."""
    limit = f", {config.train_samples} training samples" if config.train_samples else ""
    smoothing = f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""
    return (
        f"{config.data}, {config.model_label}, epochs {config.epochs}, seeds {config.seeds}, "
        f"batch size {config.batch_size}{limit}; {device}\n"
        f"{BASE_LABELS[config.base]}, lr {config.lr:g}, weight decay {config.weight_decay:g}, "
        f"rho {config.rho:g}{smoothing}"
    )


def _table_row(summary: MethodSummary) -> tuple[str, ...]:
    mark = "*" if summary.non_finite_runs else ""
    return (
        summary.method.label,
        str(summary.runs),
        _format_spread(summary.accuracy, scale=100) + mark,
        "-" if summary.gain is None else _format_spread(summary.gain, scale=100, sign="+"),
        _format_spread(summary.seconds),
        _format_cost(summary),
        f"{summary.theory:.2f}",
    )


def _format_spread(spread: Spread, scale: float = 1.0, sign: str = "") -> str:
    mean = f"{scale * spread.mean:{sign}.2f}"
    return mean if spread.sd is None else f"{mean} ± {scale * spread.sd:.2f}"


def _format_cost(summary: MethodSummary) -> str:
    if summary.cost is None:
        return "-"
    ratio = summary.cost.ratio
    median = f"{ratio.median:.2f}"
    if summary.method.is_base:  # the yardstick itself
        return median
    return f"{median} [{ratio.q25:.2f}-{ratio.q75:.2f}]"


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _notes(config: TrainConfig, summaries: Sequence[MethodSummary], batch_size: int) -> list[str]:
    spread = ", mean ± sd over runs" if any(summary.runs > 1 for summary in summaries) else ""
    notes = [f"accuracy: after the last epoch{spread}; time: training steps only"]
    if any(summary.gain is not None and summary.gain.sd is not None for summary in summaries):
        notes.append("paired: difference between runs of one seed, mean ± standard error")
    if config.equal_cost:
        spent = ", ".join(
            f"{s.method.label} {s.method.epochs} ({s.theory * s.method.epochs:.3g})"
            for s in summaries
        )
        notes.append(f"epochs (by count as many of {BASE_LABELS[config.base]}'s): {spent}")
    rounds = max((summary.cost.rounds for summary in summaries if summary.cost), default=0)
    if rounds:
        notes.append(f"step cost: median [quartiles] of {rounds} rounds measured side by side")
        if any(not summary.method.is_uniform for summary in summaries):
            notes.append("step cost: not measured where some steps are dearer than others")
    notes.append(
        f"theory: forward 1, backward 2 per sample; {BASE_LABELS[config.base]} 3M, SAM 6M, "
        f"K-SAM M + 6k, with M = {batch_size}, k = {subset_size(config.k, batch_size)}"
    )
    for summary in summaries:
        if summary.non_finite_runs:
            notes.append(
                f"* {summary.method.label}: the training loss was not finite in "
                f"{summary.non_finite_runs} of {summary.runs} runs"
            )
    return notes
