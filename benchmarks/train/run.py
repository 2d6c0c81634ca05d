"""The whole benchmark: load, time steps, train, report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.arguments import results_folder
from benchmarks.environment import device_name
from benchmarks.train.config import TrainConfig
from benchmarks.train.data import load_workload
from benchmarks.train.loop import EpochResult, train
from benchmarks.train.methods import Method, make_method
from benchmarks.train.plot import plot_accuracy, require_matplotlib
from benchmarks.train.progress import Progress
from benchmarks.train.report import TrainResults, describe, format_table, write_summary
from benchmarks.train.step_cost import measure_step_costs
from benchmarks.train.summary import summarize
from benchmarks.train.workload import Workload

_STALE = ("summary.json", "accuracy.png", "diagnostics-*.csv", "diagnostics-*.png")


def run_benchmark(config: TrainConfig, device: torch.device) -> None:
    """Run all methods and seeds, print the table and write the files."""
    require_matplotlib()
    workload = load_workload(config, device)
    with results_folder(config.out, stale=_STALE):
        _run(config, device, workload)


def _run(config: TrainConfig, device: torch.device, workload: Workload) -> None:
    machine = device_name(device)
    methods = [make_method(name, config) for name in config.methods]
    print(describe(config, machine), flush=True)

    # Before the training, whose first run would otherwise pay for warming up the libraries.
    if config.timing_rounds != 0:
        print("timing single steps side by side ...", flush=True)
    yardstick = make_method("sgd", config)
    others = [method for method in methods if method != yardstick]
    costs = measure_step_costs(workload, [yardstick, *others], config)
    paths = [config.out / name for name in ("results.csv", "summary.json", "accuracy.png")]
    results_path, summary_path, plot_path = paths
    with TrainResults(results_path, config, machine) as results_file:
        results = _train_all(workload, methods, config, results_file)
    summaries = summarize(methods, results, costs, config.batch_size)
    write_summary(summary_path, config, summaries, device)
    plot_accuracy(plot_path, config, methods, results)
    print(f"\n{format_table(config, summaries, config.batch_size)}\n")
    print("\n".join(f"wrote {path}" for path in paths))


def _train_all(
    workload: Workload,
    methods: Sequence[Method],
    config: TrainConfig,
    results_file: TrainResults,
) -> list[EpochResult]:
    """Train every method with every seed.

    The methods take turns within a seed, so that a machine that slows down over the hours does not
    slow the last method alone.
    """
    epochs = sum(method.epochs for method in methods) * config.seeds
    results = []
    with Progress(workload.steps_per_epoch(config.batch_size) * epochs) as progress:
        for seed in range(config.seeds):
            for method in methods:
                progress.start(method.name, seed, method.epochs)
                for result in train(workload, method, config, seed, progress.step):
                    results_file.write(method, result)
                    progress.epoch(result)
                    results.append(result)
    return results
