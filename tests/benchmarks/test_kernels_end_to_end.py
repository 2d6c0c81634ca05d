"""The whole command, from arguments to files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.kernels import topk
from benchmarks.kernels.measure import Row
from benchmarks.kernels.report import COLUMNS, Table, format_ratio, summary_lines
from benchmarks.timing import Quartiles
from tests.helpers import read_rows, threads


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidths = iter([1e10, 2e10])  # before and after a run
    monkeypatch.setattr("benchmarks.kernels.run.copy_bandwidth", lambda _: next(bandwidths))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with threads(torch.get_num_threads()):
        yield


def run_kernels(*arguments: object) -> int:
    return main(["kernels", "--device", "cpu", *map(str, arguments)])


def test_quick_topk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    status = run_kernels(
        *("--quick", "--rooms", "topk", "--backend", "reference", "--threads", 1),
        *("--out", out),
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "\ntopk\n" in printed
    assert "\nloss\n" not in printed
    assert "\nhost" not in printed

    rows = read_rows(out / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["contestant"] for row in rows[:3]] == ["ksam", "topk", "sort"]
    assert [row["backend"] for row in rows[:3]] == ["reference", "torch", "torch"]
    for row in rows:
        assert (row["room"], row["threads"], row["note"]) == ("topk", "1", "")
        quartiles = [float(row[f"{name}_us"]) for name in ("q25", "median", "q75")]
        assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]
        # 1e10 bytes a second are 1e4 bytes a microsecond.
        share = int(row["floor_bytes"]) / float(row["median_us"]) / 1e4
        assert float(row["share_of_copy"]) == pytest.approx(share)

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["copy_bytes_per_second"] == {"before": 1e10, "after": 2e10}
    assert (out / "ratios.png").read_bytes().startswith(b"\x89PNG")
    for name in ("results.csv", "summary.json", "ratios.png"):
        assert f"wrote {out / name}" in printed


def test_host_section_comes_with_perturb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.kernels.perturb.MODELS", {"ResNet-50": lambda: [(8, 8)]})
    monkeypatch.setattr("benchmarks.kernels.perturb._HOST_COUNTS", (62,))
    assert run_kernels("--quick", "--rooms", "perturb", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "\nhost: microseconds a call takes" in printed
    host = [row for row in read_rows(tmp_path / "results.csv") if row["room"] == "host"]
    assert [row["operation"] for row in host if row["contestant"] == "ksam"] == [
        "perturb_", "restore_sgd_", "restore_adam_",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rooms", "topk,attic"), "'topk,attic': expected a comma-separated list of loss, topk"),
        (("--rooms", ""), "expected a comma-separated list"),
        (("--threads", "0"), "'0' is not a count >= 1"),
        (("--backend", "fast"), "invalid choice: 'fast'"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run_kernels(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_kernels("--quick", "--rooms", "topk", "--out", tmp_path / "file" / "out") == 2
    assert "cannot create the folder" in capsys.readouterr().err


def test_a_run_that_measures_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--quick", "--rooms", "topk", "--backend", "triton", "--threads", 1)
    assert run_kernels(*arguments, "--out", tmp_path) == 2
    assert "nothing could be measured: backend 'triton' was asked for" in capsys.readouterr().err
    assert not (tmp_path / "ratios.png").exists()


def make_row(contestant: str, ratio: float | None, note: str = "") -> Row:
    measured = ratio is not None
    return Row(
        room="topk",
        operation="topk_indices",
        shape="64",
        dtype="float32",
        extra="",
        contestant=contestant,
        backend="torch",
        floor_bytes=256,
        microseconds=Quartiles(2.0, 2.4, 3.0) if measured else None,
        ratio=ratio,
        share_of_copy=0.5 if measured else None,
        note=note,
    )


def test_losing_rows_are_marked_and_counted() -> None:
    assert [format_ratio(x) for x in (2.0, 1.0, 0.996, 0.99)] == [
        "2.00 ",
        "1.00 ",
        "1.00 ",
        "0.99*",
    ]
    rows = [
        make_row("ksam", 1.0),
        make_row("sort", 2.0),
        make_row("sort", 0.5),
        make_row("none", None, "because"),
    ]
    assert summary_lines(rows) == ["sort: ksam is slower in 1 of 2 cases"]


def test_disturbed_cases_are_marked_and_counted() -> None:
    case = next(topk.cases(torch.device("cpu")))
    table = Table([case], ["topk", "sort"])
    for rate, mark in ((None, ""), (3.0, ""), (200.0, "~")):
        row = dataclasses.replace(make_row("ksam", 1.0), preemptions_per_s=rate)
        assert f" 2.4{mark} " in table.line(case, [row]) + " "
        assert any("disturbed 1 of 1" in line for line in summary_lines([row])) == bool(mark)


def test_reasons_are_numbered_below_the_table() -> None:
    case = next(topk.cases(torch.device("cpu")))
    table = Table([case], ["topk", "sort"])
    rows = [make_row("ksam", 1.0), make_row("topk", 0.5), make_row("sort", None, "it is broken")]
    line = table.line(case, rows)
    assert line.split()[-5:] == ["50", "%", "0.50*", "-", "[1]"]
    assert table.notes({"topk": "a", "sort": "b"}) == ["topk: a", "sort: b", "[1] it is broken"]
    assert len(line) <= len(table.header().splitlines()[1])
    rows[1] = dataclasses.replace(rows[1], microseconds=Quartiles(1.9, 2.0, 3.0))
    assert table.line(case, rows).split()[-3] == "0.50*~"
