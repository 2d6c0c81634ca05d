"""The study, which runs methods and seeds in processes and goes on where it was cut off."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.train import study
from tests import forks
from tests.helpers import ROOT, read_rows, wait_for


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start at once; those of the command that is killed below are spawned."""

    def get_context(method: str) -> ForkServerContext:
        assert method == "spawn"  # as CUDA cannot be used in a fork
        return forks.context()

    monkeypatch.setattr(study, "multiprocessing", SimpleNamespace(get_context=get_context))


def test_the_study_goes_on_where_it_stopped(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = (
        "--epochs", 2, "--train-samples", 96, "--batch-size", 32, "--methods", "sgd,ksam",
        "--processes", 2, "--out", tmp_path,
    )  # fmt: skip
    result = cli(*arguments, "--seeds", 1, command="study")
    assert result.status == 0, result.err
    assert "0 runs complete, 2 to do" in result.out
    assert "K-SAM, k=1/3" in result.out
    path = tmp_path / "study.csv"
    first = read_rows(path)
    assert {(row["method"], row["epoch"]) for row in first} == {
        (method, epoch) for method in ("sgd", "ksam") for epoch in "12"
    }
    # The last epoch of a run is cut off, in the middle of the line.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = [line for line in lines if ",ksam," not in line or ",2," not in line]
    long_ago = "2001-01-01T00:00:00+00:00"
    cut = [cut[0], *(f"{line.rpartition(',')[0]},{long_ago}\n" for line in cut[1:])]
    (lost,) = (line for line in lines if ",ksam," in line and ",2," in line)
    path.write_text("".join([*cut, lost[:40]]), encoding="utf-8")
    result = cli(*arguments, "--seeds", 2, command="study")
    assert result.status == 0, result.err
    assert "1 runs complete, 3 to do" in result.out
    rows = read_rows(path)
    assert len(rows) == 8
    assert {row["device"].rpartition(", ")[2] for row in rows} == {"1 threads"}  # a process's
    old = [(r["method"], r["seed"]) for r in rows if r["timestamp"] == long_ago]
    assert old == [("sgd", "0")] * 2

    def accuracy(table: list[dict[str, str]]) -> dict[tuple[str, str], str]:
        return {(r["method"], r["epoch"]): r["test_accuracy"] for r in table if r["seed"] == "0"}

    assert accuracy(rows) == accuracy(first)
    result = cli(*arguments[2:], "--epochs", 3, command="study")
    assert result.status == 2
    assert "contains runs with epochs=2, not 3; use another folder" in result.err
    path.write_text(path.read_text(encoding="utf-8").replace(",ksam,", ",kasm,"), encoding="utf-8")
    result = cli(*arguments, command="study")
    assert result.status == 2
    assert "contains runs of unknown methods: kasm" in result.err


def test_at_equal_cost_dearer_methods_train_for_fewer_epochs(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = (
        "--epochs", 5, "--equal-cost", "--train-samples", 96, "--batch-size", 32, "--seeds", 1,
        "--out", tmp_path,
    )  # fmt: skip
    result = cli(*arguments, "--methods", "sgd,sam,random-sam", command="study")
    assert result.status == 0, result.err
    epochs = Counter(row["method"] for row in read_rows(tmp_path / "study.csv"))
    assert epochs == {"sgd": 5, "sam": 2, "random-sam": 4}  # at a cost of 1, 2 and 1.25
    assert "SGD 5 (5), SAM 2 (4), random-subset SAM 4 (5)" in result.out
    assert "+" in result.out  # paired, though their last epochs differ
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    result = cli(*arguments, "--methods", "sgd,sam,random-sam,late-sam", command="study")
    assert "3 runs complete, 1 to do" in result.out
    rows = [row for row in read_rows(tmp_path / "study.csv") if row["method"] == "late-sam"]
    assert len(rows) == 4
    # "Late" counts from the end of its own four epochs of three steps: 2 of 12 steps are SAM's.
    assert float(rows[-1]["gradient_cost"]) == pytest.approx(14 / 12)


@pytest.mark.parametrize("command", ["study", "train", "kernels", "memory", "gpu"])
def test_no_two_runs_write_to_one_folder(
    cli: Callable[..., Any], tmp_path: Path, command: str
) -> None:
    arguments: tuple[object, ...] = ("--out", tmp_path)
    if command in ("study", "train"):
        arguments = ("--train-samples", 96, "--methods", "sgd", *arguments)
    elif command == "gpu":
        arguments = ("--dry-run", *arguments)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        result = cli(*arguments, command=command)
    finally:
        os.close(folder)
    assert result.status == 2
    assert f"--out {tmp_path}: another run is writing to this folder" in result.err
    assert list(tmp_path.iterdir()) == []


def test_settings_count_where_there_are_runs(cli: Callable[..., Any], tmp_path: Path) -> None:
    """A first call with a mistake leaves none."""
    arguments = (
        "--epochs", 1, "--batch-size", 32, "--methods", "sgd", "--seeds", 1, "--out", tmp_path,
    )  # fmt: skip
    assert cli(*arguments, "--train-samples", 5000, command="study").status == 2
    result = cli(*arguments, "--train-samples", 64, command="study")
    assert result.status == 0, result.err
    (tmp_path / "settings.json").write_text("", encoding="utf-8")
    result = cli(*arguments, "--train-samples", 64, command="study")
    assert result.status == 2
    assert "settings.json: cannot read the settings of the runs in this folder" in result.err


def test_the_study_stops_when_time_is_up(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "--epochs", 500, "--train-samples", 96, "--batch-size", 32, "--methods", "sgd",
        "--seeds", 1, "--minutes", 0.001, "--out", tmp_path, command="study",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert len(read_rows(tmp_path / "study.csv")) < 500


def test_processes_of_a_killed_study_end(tmp_path: Path) -> None:
    arguments = ("--epochs", "5000", "--methods", "sgd", "--seeds", "2", "--processes", "2")
    command = [sys.executable, "-m", "benchmarks", "study", *arguments, "--out", str(tmp_path)]
    study = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    table = tmp_path / "study.csv"

    def seen(text: str, path: Path) -> bool:
        try:
            return text in path.read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):  # not yet, or a process that has ended
            return False

    def workers() -> list[Path]:
        parent = f"\nPPid:\t{study.pid}\n"
        return [path for path in Path("/proc").glob("[0-9]*/status") if seen(parent, path)]

    wait_for(lambda: seen(",1,", table) and len(workers()) >= 2)
    running = workers()
    study.kill()
    study.wait()
    wait_for(lambda: not any(path.exists() for path in running))


@pytest.mark.parametrize("command", ["study", "train"])
def test_a_batch_larger_than_the_data_set_is_a_mistake(
    cli: Callable[..., Any], tmp_path: Path, command: str
) -> None:
    result = cli("--batch-size", 2000, "--methods", "sgd", "--out", tmp_path, command=command)
    assert result.status == 2
    assert "--batch-size 2000: the training set has only 1347 samples" in result.err


def test_a_study_whose_processes_fail_is_no_mistake_of_the_user(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_run_all", lambda *_: iter(["Traceback ... KeyError: 'x'"]))
    result = cli("--methods", "sgd", "--out", tmp_path, command="study")
    assert result.status == 1
    assert "KeyError" in result.out
    assert result.err == "processes that failed: 1\n"


def test_a_mistake_in_a_study_is_one_sentence(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("--train-samples", 5000, "--seeds", 1, "--methods", "sgd", "--out", tmp_path)
    result = cli(*arguments, command="study")
    assert result.status == 2
    assert "--train-samples 5000: the training set has only 1347 samples" in result.err
    assert "Traceback" not in result.err


def test_the_study_times_no_steps(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("--timing-rounds", 3, "--out", tmp_path, command="study")
    assert result.status == 2
    assert "unrecognized arguments: --timing-rounds" in result.err
