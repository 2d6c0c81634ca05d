"""The whole command, from arguments to files."""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.environment import commit
from benchmarks.train.report import COLUMNS
from ksam_kernels import requested_backend
from tests.helpers import ROOT, read_rows


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_run_that_is_cut_off_leaves_nothing_of_another(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in (
        "results.csv",
        "summary.json",
        "accuracy.png",
        "diagnostics-ksam.csv",
        "diagnostics-ksam.png",
        "diagnostics-notes.txt",
    ):
        (tmp_path / name).write_text("of another run", encoding="utf-8")
    monkeypatch.setattr("benchmarks.train.run._train_all", cut_off)
    result = cli("--train-samples", 96, "--timing-rounds", 0, "--out", tmp_path)
    assert result.status == 130
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["diagnostics-notes.txt", "results.csv"]
    assert read_rows(tmp_path / "results.csv") == []


def test_a_folder_that_is_not_writable_is_named_at_once(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o555)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr(os, "access", lambda path, _: not os.path.samefile(path, tmp_path))
    result = cli("--out", tmp_path)
    assert result.status == 2
    assert f"{tmp_path}: cannot write to the folder" in result.err


def test_digits(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = cli(
        *("--seeds", 1, "--epochs", 2, "--timing-rounds", 2),
        *("--rho", 0.1, "--weight-decay", 0.001, "--out", out),
    )
    assert result.status == 0, result.err
    rows = read_rows(out / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [
        (method, "0", epoch) for method in ("sgd", "sam", "ksam") for epoch in ("1", "2")
    ]
    assert {(row["data"], row["model"], row["base"]) for row in rows} == {("digits", "cnn", "sgd")}
    assert [(row["k"], row["rho"]) for row in rows[::2]] == [
        ("", ""), ("1.0", "0.1"), (repr(1 / 3), "0.1"),
    ]  # fmt: skip
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["weight_decay"] for row in rows} == {"0.001"}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        # Two epochs from scratch: already far above chance, and the loss falls.
        assert 0.15 < float(second["test_accuracy"]) <= 1
        assert 0 < float(second["train_loss"]) < float(first["train_loss"])
        assert 0 < float(first["train_seconds"]) < float(second["train_seconds"])

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [entry["accuracy"]["mean"] for entry in summary["methods"]] == [
        float(row["test_accuracy"]) for row in rows[1::2]
    ]
    assert summary["settings"]["rho"] == 0.1
    assert (summary["commit"], summary["backend"]) == (commit(), requested_backend())
    assert summary["threads"] == torch.get_num_threads()
    assert summary["methods"][2]["cost"]["rounds"] == 2
    assert png_size(out / "accuracy.png") == (1050, 675)
    for name in ("results.csv", "summary.json", "accuracy.png"):
        assert f"wrote {out / name}" in result.out
    for row in rows[1::2]:
        accuracy = f"{100 * float(row['test_accuracy']):.2f}"
        assert f"{row['method']} seed 0 epoch 2/2 accuracy {accuracy} %" in result.out
    assert "±" not in result.out


def test_results_name_the_commit_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists():
        assert commit() == os.environ.get("KSAM_COMMIT")
        return
    monkeypatch.delenv("KSAM_COMMIT", raising=False)
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert commit() in (head.strip(), f"{head.strip()}-dirty")


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("named", ["0123456789ab", None])
def test_the_environment_may_name_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, clone: bool
) -> None:
    """A copy on another machine may lie in a clone that is at some other commit."""
    monkeypatch.delenv("KSAM_COMMIT", raising=False)
    if not clone:
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    of_clone = commit()
    assert clone or of_clone is None
    if named is not None:
        monkeypatch.setenv("KSAM_COMMIT", named)
    assert commit() == (named or of_clone)


def test_seeds_are_averaged(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli(
        "--seeds", 2, "--epochs", 1, "--methods", "ksam", "--k", 10, "--train-samples", 200,
        "--batch-size", 50, "--timing-rounds", 0, "--out", tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = read_rows(tmp_path / "results.csv")
    assert [(row["method"], row["seed"], row["k"]) for row in rows] == [
        ("ksam", "0", "10"), ("ksam", "1", "10"),
    ]  # fmt: skip
    accuracies = [100 * float(row["test_accuracy"]) for row in rows]
    mean, sd = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f"{mean:.2f} ± {sd:.2f}" in result.out
    assert "M = 50, k = 10" in result.out


def test_cifar10(cli: Callable[..., Any], cifar_pickles: Any, tmp_path: Path) -> None:
    result = cli(
        "--data", "cifar10", "--data-root", cifar_pickles.root, "--seeds", 1, "--epochs", 1,
        "--batch-size", 32, "--timing-rounds", 0, "--methods", "sgd,ksam", "--out", tmp_path / "o",
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = read_rows(tmp_path / "o" / "results.csv")
    assert [(row["method"], row["model"]) for row in rows] == [
        ("sgd", "resnet8"), ("ksam", "resnet8"),
    ]  # fmt: skip


def test_a_run_repeats_bit_for_bit(cli: Callable[..., Any], tmp_path: Path) -> None:
    figures = []
    for name in ("one", "two"):
        result = cli(
            "--seeds", 1, "--epochs", 1, "--methods", "ksam", "--train-samples", 256,
            "--timing-rounds", 0, "--out", tmp_path / name,
        )  # fmt: skip
        assert result.status == 0, result.err
        (row,) = read_rows(tmp_path / name / "results.csv")
        figures.append((row["train_loss"], row["test_accuracy"]))
    assert figures[0] == figures[1]
