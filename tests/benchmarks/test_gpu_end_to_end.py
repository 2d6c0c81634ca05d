"""The whole command as a dry run on the CPU: every part, its file and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import sync
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.tests import SHARES
from tests.helpers import read_rows

ROOT = Path(__file__).parent.parent.parent


def dry_run(out: Path, *arguments: str) -> int:
    return main(["gpu", "--dry-run", "--out", str(out), *arguments])


def read(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"dry-run-{name}.json").read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all parts but `tests`, which starts a pytest of its own."""
    folder = tmp_path_factory.mktemp("gpu")
    names = [name for name in PARTS if name != "tests"]
    assert dry_run(folder, "--only", ",".join(names)) == 0
    return folder


def test_every_part_leaves_a_complete_file(out: Path) -> None:
    for name in set(PARTS) - {"tests"}:
        assert read(out, name)["complete"], name
        assert read(out, name)["torch"] == torch.__version__


def test_steps_do_not_wait_and_replay_to_the_same_bits(out: Path) -> None:
    kinds = {"operations", "KSAM over SGD", "KSAM over AdamW"}
    steps = read(out, "sync")["results"]
    assert set(steps) == kinds
    assert all(not found["later steps"]["waits"] for found in steps.values())
    graphs = read(out, "graph")["results"]
    assert set(graphs) == kinds
    for found in graphs.values():
        assert found["captured"]
        assert found["finite"]
        assert found["different"] == 0
        assert found["tensors"] > 10


def test_launches_and_host_times_are_per_call_of_a_step(out: Path) -> None:
    calls = ["select_cross_entropy", "compact_batch", "perturb_", "restore_sgd_", "together"]
    assert list(read(out, "launches")["results"]["step"]) == calls
    host = read(out, "host")["results"]
    assert list(host["step"]) == calls
    assert 0 < host["step"]["perturb_"]["median"] < host["step"]["together"]["median"]
    for counted in read(out, "launches")["results"]["operations"].values():
        assert all("error" not in found for found in counted.values())


def test_times_stand_in_the_csv_with_backend_and_mode(out: Path) -> None:
    found = read(out, "kernels")["results"]
    assert found["failures"] == {}
    assert found["left_out"] == []
    assert {"before", "after"} == set(found["copy_bytes_per_second"])
    rows = read_rows(out / "dry-run-results.csv")
    assert {row["room"] for row in rows} == {"loss", "topk", "compact", "perturb"}
    assert {row["mode"] for row in rows} == {"cpu"}
    for row, measured in zip(rows, found["rows"], strict=True):
        times = {name: float(row[f"{name}_us"]) for name in measured["microseconds"]}
        assert times == measured["microseconds"]
        assert times["q25"] <= times["median"] <= times["q75"]
        assert (row["backend"] == "torch") == (row["contestant"] != "ksam")
        assert (row["share_of_equal_copy"] != "") == (row["contestant"] == "ksam")


def test_the_report_is_a_page_that_says_what_it_is(out: Path) -> None:
    text = (out / "dry-run-report.md").read_text(encoding="utf-8")
    assert "A dry run on the CPU: no figure here means anything." in text
    measured = [line for line in text.splitlines() if line.startswith("| loss forward")]
    assert "8 cases" not in measured[0]
    assert "7 cases" in measured[0]
    assert "| contract tests | all pass | not measured | not measured |" in text
    assert (out / "dry-run-ratios.png").read_bytes().startswith(b"\x89PNG")
    summary = read(out, "summary")
    assert len(summary["aims"]) == 12
    assert set(summary["parts"]) == set(PARTS) - {"tests"}


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        return
    assert main(["gpu"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_the_shares_of_the_tests_are_all_of_the_contract_tests() -> None:
    shared = {path for paths, _ in SHARES.values() for path in paths}
    for path in shared:
        assert (ROOT / path).exists(), path
    rooms = ("loss", "topk", "compact", "perturb", "ksam")
    files = {f"tests/{room}" for room in rooms} | {"tests/test_operators.py"}
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / "tests/fuzz").glob("test_*.py")}
    others = ("device_assertions", "native", "negative", "docs")
    assert files | {f"tests/test_{name}.py" for name in others} == shared
    # What chooses a backend, and what needs no GPU by what it is.
    of_the_cpu = ("tests/test_backends.py", "tests/benchmarks", "tests/simt", "tests/triton")
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        if "backend: str" in text or "DEVICE" in text:
            name = str(path.relative_to(ROOT))
            assert any(name.startswith(part) for part in (*shared, *of_the_cpu)), name


def test_a_wait_is_an_error_only_inside() -> None:
    with sync.waiting_is_an_error(torch.device("cpu")):
        torch.ones(1).item()
