"""``python -m benchmarks study``: methods x seeds in parallel processes, resumable, as one CSV."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import positive_float, positive_int, results_folder
from benchmarks.environment import device_name, select_device
from benchmarks.errors import UsageError
from benchmarks.train import cli
from benchmarks.train.config import TrainConfig, resolve
from benchmarks.train.data import load_workload
from benchmarks.train.loop import EpochResult, train
from benchmarks.train.methods import METHODS, make_method
from benchmarks.train.plot import plot_accuracy, require_matplotlib
from benchmarks.train.report import TrainResults, format_table
from benchmarks.train.summary import summarize

_POLL_SECONDS = 1.0
# Settings that another call may change when it goes on with the same file.
_FREE = ("methods", "seeds", "out", "data_root", "timing_rounds", "diagnostics")

Task = tuple[str, int]  # method, seed
Message = EpochResult | UsageError | str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `study`: those of `train` but for its timing, and how to run them."""
    cli.add_training_arguments(parser)
    parser.set_defaults(timing_rounds=None)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="runs at a time, all on the one device, each on --threads CPU threads (default: 1)",
    )
    group.add_argument(
        "--minutes",
        type=positive_float,
        metavar="T",
        help="stop at the first epoch that ends later than this; the same command goes on with the "
        "runs that are not complete (default: no limit)",
    )


@dataclass(frozen=True)
class _Worker:
    """What a process needs to know."""

    config: TrainConfig
    device: str
    threads: int
    deadline: float | None  # time.time()


def run(args: argparse.Namespace) -> None:
    """Run what is not in the file yet."""
    require_matplotlib()
    started = time.time()
    device, config = select_device(args.device), resolve(args)
    deadline = None if args.minutes is None else started + 60 * args.minutes
    worker = _Worker(config, str(device), args.threads or 1, deadline)
    torch.set_num_threads(worker.threads)  # as in the processes: the rows name it
    with results_folder(config.out):
        path = _prepare(config)
        done, rows = _complete(path, config)
        tasks = [(m, s) for s in range(config.seeds) for m in config.methods if (m, s) not in done]
        print(f"{len(done)} runs complete, {len(tasks)} to do, {path}", flush=True)
        mistakes, failures = [], 0
        with TrainResults(path, config, device_name(device), rows) as file:
            for message in _run_all(worker, tasks, min(args.processes, len(tasks))):
                if isinstance(message, EpochResult):
                    file.write(make_method(message.method, config), message)
                    _print(message, config, time.time() - started)
                elif isinstance(message, UsageError):
                    mistakes.append(message)
                else:
                    failures += 1
                    print(message, flush=True)
        _report(path, config)
    if mistakes:
        raise mistakes[0]  # the same in all processes
    if failures:
        print(f"processes that failed: {failures}", file=sys.stderr)
        raise SystemExit(1)


def _run_all(worker: _Worker, tasks: Sequence[Task], count: int) -> Iterator[Message]:
    """Yield the results of all runs as they come, mistakes, and the traces of what failed."""
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    todo, found = context.Queue(), context.Queue()
    for task in tasks:
        todo.put(task)
    for _ in range(count):
        todo.put(None)
    processes = [
        context.Process(target=_work, args=(worker, todo, found), daemon=True) for _ in range(count)
    ]
    for process in processes:
        process.start()
    running = count
    while running:
        try:
            message = found.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            # A process that was killed says nothing.
            if not any(process.is_alive() for process in processes):
                yield f"processes that ended without a result, killed or crashed: {running}"
                return
            continue
        if message is None:
            running -= 1
        else:
            yield message
    for process in processes:
        process.join()


def _work(worker: _Worker, todo: Any, found: Any) -> None:
    """A process: run tasks until there are none, or no time."""
    try:
        torch.set_num_threads(worker.threads)
        workload = load_workload(worker.config, torch.device(worker.device))
        while (task := todo.get()) is not None and not _late(worker):
            name, seed = task
            method = make_method(name, worker.config)
            for result in train(workload, method, worker.config, seed, lambda: None):
                found.put(result)
                if _late(worker) or _is_orphan():
                    return
    except UsageError as error:
        found.put(error)
    except KeyboardInterrupt:  # the study has it too, and says so
        return
    except BaseException:
        found.put(traceback.format_exc())
        raise
    finally:
        found.put(None)


def _is_orphan() -> bool:
    """Whether the study was killed, which the queues do not tell."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _late(worker: _Worker) -> bool:
    return worker.deadline is not None and time.time() > worker.deadline


def _prepare(config: TrainConfig) -> Path:
    """Check that runs in the folder have the same settings; return the CSV's path."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    settings = {name: value for name, value in settings.items() if name not in _FREE}
    path, table = config.out / "settings.json", config.out / "study.csv"
    if table.exists() and len(table.read_text(encoding="utf-8").splitlines()) > 1:
        before = _settings_in(path)
        for name, value in settings.items():
            if before.get(name) != value:
                held = f"contains runs with {name}={before.get(name)!r}, not {value!r}"
                raise UsageError(f"--out {config.out}: {held}; use another folder")
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)
    return table


def _settings_in(path: Path) -> dict[str, Any]:
    """The settings, in this file, of the runs beside it."""
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot read the settings of the runs in this folder: {error}"
        ) from error
    return settings


def _complete(path: Path, config: TrainConfig) -> tuple[set[Task], list[dict[str, str]]]:
    """The runs in the file that reached the last epoch, and their rows."""
    if not path.exists():
        return set(), []
    with path.open(newline="", encoding="utf-8") as file:
        # A last line that was cut off lacks columns.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    names = {row["method"] for row in rows}
    unknown = names - set(METHODS)
    if unknown:
        raise UsageError(f"{path}: contains runs of unknown methods: {', '.join(sorted(unknown))}")
    last = {name: make_method(name, config).epochs for name in names}
    done = {(r["method"], int(r["seed"])) for r in rows if int(r["epoch"]) == last[r["method"]]}
    return done, [row for row in rows if (row["method"], int(row["seed"])) in done]


def _print(result: EpochResult, config: TrainConfig, seconds: float) -> None:
    if result.epoch == make_method(result.method, config).epochs:
        print(
            f"{seconds:6.0f} s  {result.method} seed {result.seed}: "
            f"{100 * result.test_accuracy:.2f} %, {result.train_seconds:.1f} s of training",
            flush=True,
        )


def _report(path: Path, config: TrainConfig) -> None:
    """Print the table of the methods' complete runs, and plot them."""
    _, rows = _complete(path, config)
    results = [
        EpochResult(
            row["method"], int(row["seed"]), int(row["epoch"]), float(row["train_seconds"]),
            float(row["train_loss"]), float(row["test_accuracy"]), float(row["gradient_cost"]),
        )
        for row in rows
    ]  # fmt: skip
    names = [n for n in config.methods if any(result.method == n for result in results)]
    if names:
        methods = [make_method(name, config) for name in names]
        summaries = summarize(methods, results, {}, config.batch_size)
        print(f"\n{format_table(config, summaries, config.batch_size)}\n")
        plot_accuracy(path.with_name("accuracy.png"), config, methods, results, over_cost=True)
