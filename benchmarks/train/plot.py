"""Accuracy against training time, or against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.errors import import_optional
from benchmarks.train.config import TrainConfig, format_k
from benchmarks.train.loop import EpochResult
from benchmarks.train.methods import BASE_LABELS, Method

# Okabe and Ito's colors, told apart with any color vision; the markers serve black and white.
_STYLES = {
    "sgd": ("#0072B2", "o"),
    "sam": ("#D55E00", "s"),
    "ksam": ("#009E73", "^"),
    "ksam-auto": ("#000000", "D"),
}
_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_MARKERS = "v<>ph*X"


def _style(name: str, number: int) -> tuple[str, str]:
    """Color and marker of the `number`-th method of a plot; the best known keep theirs."""
    other = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    return _STYLES.get(name, other)


def require_matplotlib() -> None:
    """Fail now, rather than after hours of training, if there is no matplotlib."""
    import_optional("matplotlib", package="matplotlib", needed_by="accuracy.png")


def plot_accuracy(
    path: Path,
    config: TrainConfig,
    methods: Sequence[Method],
    results: Sequence[EpochResult],
    over_cost: bool = False,
) -> None:
    """Draw test accuracy: a line per method, its band ± 1 sd over seeds.

    Over training seconds, or over the cost by count so far, which is not disturbed by runs beside
    each other.
    """
    # A bare Figure draws to files without pyplot's choice of a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(methods):
        spent, mean, sd = accuracy_curve(method, results, over_cost)
        color, marker = _style(method.name, number)
        label = _label(method, results)
        axes.plot(spent, 100 * mean, color=color, marker=marker, ms=4, label=label)
        if sd is not None:
            axes.fill_between(
                spent, 100 * (mean - sd), 100 * (mean + sd), color=color, alpha=0.2, lw=0
            )
    cost = f"cost by count [epochs of {BASE_LABELS[config.base]}]"
    axes.set_xlabel(cost if over_cost else "training time [s]")
    axes.set_ylabel("test accuracy [%]")
    axes.set_title(_title(config), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def accuracy_curve(
    method: Method, results: Sequence[EpochResult], over_cost: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return a method's mean seconds or cost, mean accuracy and its sd over seeds, each [epochs].

    The sd is None for a single seed.
    """
    own = [result for result in results if result.method == method.name]
    epochs = sorted({result.epoch for result in own})
    by_epoch = [[result for result in own if result.epoch == epoch] for epoch in epochs]
    spent = np.array([[_spent(result, over_cost) for result in row] for row in by_epoch])
    accuracy = np.array([[result.test_accuracy for result in row] for row in by_epoch])
    sd = accuracy.std(axis=1, ddof=1) if accuracy.shape[1] > 1 else None
    return spent.mean(axis=1), accuracy.mean(axis=1), sd


def _spent(result: EpochResult, over_cost: bool) -> float:
    return result.gradient_cost * result.epoch if over_cost else result.train_seconds


def _label(method: Method, results: Sequence[EpochResult]) -> str:
    runs = len({result.seed for result in results if result.method == method.name})
    return f"{method.label}, {f'mean ± sd of {runs} runs' if runs > 1 else '1 run'}"


def _title(config: TrainConfig) -> str:
    return (
        f"{config.data}, {config.model_label}, base {BASE_LABELS[config.base]}: "
        f"k = {format_k(config.k)}, rho = {config.rho:g}"
    )
