"""Accuracy against training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.errors import import_optional
from benchmarks.train.config import TrainConfig, format_k
from benchmarks.train.loop import EpochResult
from benchmarks.train.methods import BASE_LABELS, Method

# Okabe and Ito's colors, told apart with any color vision; the markers serve black and white.
_STYLES = {"sgd": ("#0072B2", "o"), "sam": ("#D55E00", "s"), "ksam": ("#009E73", "^")}
_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "vD<>ph*X"


def _style(name: str, number: int) -> tuple[str, str]:
    """Color and marker of the `number`-th method of a plot; the best known keep theirs."""
    other = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    return _STYLES.get(name, other)


def require_matplotlib() -> None:
    """Fail now, rather than after hours of training, if there is no matplotlib."""
    import_optional("matplotlib", package="matplotlib", needed_by="accuracy.png")


def plot_accuracy(
    path: Path, config: TrainConfig, methods: Sequence[Method], results: Sequence[EpochResult]
) -> None:
    """Draw test accuracy over training seconds: a line per method, its band ± 1 sd over seeds."""
    # A bare Figure draws to files without pyplot's choice of a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(methods):
        seconds, mean, sd = accuracy_curve(method, results)
        color, marker = _style(method.name, number)
        axes.plot(seconds, 100 * mean, color=color, marker=marker, ms=4, label=method.label)
        if sd is not None:
            axes.fill_between(
                seconds, 100 * (mean - sd), 100 * (mean + sd), color=color, alpha=0.2, lw=0
            )
    axes.set_xlabel("training time [s]")
    axes.set_ylabel("test accuracy [%]")
    axes.set_title(_title(config), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def accuracy_curve(
    method: Method, results: Sequence[EpochResult]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return a method's mean seconds, mean accuracy and its sd over seeds, each [epochs].

    The sd is None for a single seed.
    """
    own = [result for result in results if result.method == method.name]
    epochs = sorted({result.epoch for result in own})
    by_epoch = [[result for result in own if result.epoch == epoch] for epoch in epochs]
    seconds = np.array([[result.train_seconds for result in row] for row in by_epoch])
    accuracy = np.array([[result.test_accuracy for result in row] for row in by_epoch])
    sd = accuracy.std(axis=1, ddof=1) if accuracy.shape[1] > 1 else None
    return seconds.mean(axis=1), accuracy.mean(axis=1), sd


def _title(config: TrainConfig) -> str:
    seeds = f"mean ± sd of {config.seeds} seeds" if config.seeds > 1 else "1 seed"
    return (
        f"{config.data}, {config.model_label}, base {BASE_LABELS[config.base]}: "
        f"k = {format_k(config.k)}, rho = {config.rho:g}, {seeds}"
    )
