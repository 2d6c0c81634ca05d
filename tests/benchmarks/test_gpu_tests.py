"""The part `tests` of the run on a GPU: its shares, their queue, and what their output says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.aims import aims
from benchmarks.gpu.part import Context, PartFile
from benchmarks.gpu.report import write_report
from benchmarks.gpu.run import run_in_process
from benchmarks.gpu.share import Selection
from benchmarks.gpu.tests import (
    Share,
    _environment,
    all_shares,
    demanded,
    nothing,
    read_log,
    run,
    summarize,
)

CPU = torch.device("cpu")

OUTPUT = """\
tests/topk/test_topk.py::test_strided[native-torch.float32] PASSED [ 10%]
tests/topk/test_topk.py::test_strided[reference-torch.float32] FAILED [ 20%]
tests/perturb/test_norm.py::test_any_layout[native-sliced] ERROR [ 30%]
tests/ksam/test_optimizer.py::test_base_can_be an_instance PASSED [ 40%]
tests/loss/test_x.py::test_of_a_long_name[reference-some thing] SKIPPED (why) [ 50%]
E   AssertionError: tests/topk/test_topk.py::test_strided PASSED
left out on cuda: 12. an index or class out of range is an IndexError on the CPU only
===== 1 failed, 2 passed =====
"""


def test_outcomes_are_counted_by_backend(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(OUTPUT)
    (tmp_path / "b.log").write_text(OUTPUT.splitlines(keepends=True)[0])
    statuses: dict[str, int | str] = {"a": 1, "b": "ended after 3 s"}
    shares = {name: read_log(tmp_path / f"{name}.log", status) for name, status in statuses.items()}
    wanted = {"native": None, "triton": "this installation has no Triton kernels"}
    found = summarize({**shares, "c": nothing("not started")}, wanted)
    assert found["by_backend"] == {
        "native": {"passed": 2, "error": 1},
        "reference": {"failed": 1, "skipped": 1},
        "no backend": {"passed": 1},
    }
    assert found["without_form_on_device"] == 12
    assert found["left_out"] == ["b", "c"]
    assert found["demanded"] == ["native", "triton"]
    assert found["failures"] == {
        "triton": "this installation has no Triton kernels",
        "a": "2 failed, the first tests/topk/test_topk.py::test_strided[reference-torch.float32]",
    }
    assert len(found["failed"]) == 2
    assert found["shares"]["a"]["output_tail"].endswith("1 failed, 2 passed =====\n")


def test_the_lines_that_pytest_prints_are_those_that_are_counted(tmp_path: Path) -> None:
    """In a process of its own, as in the run."""
    context = Context(CPU, tmp_path, dry_run=True)
    file = PartFile("tests", context)
    run(context, file)
    assert file.results["statuses"] == {"topk-others-1of1": 0}
    assert file.results["by_backend"]["reference"] == {"passed": 1}
    assert file.results["failed"] == []


def test_a_machine_without_pytest_has_failed_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Share, "command", [sys.executable, "-m", "no_such_pytest"])
    monkeypatch.delenv("KSAM_TEST_BACKENDS", raising=False)
    context = Context(CPU, tmp_path, dry_run=True)
    run_in_process("tests", context)
    left = PartFile("tests", context).load()
    assert left is not None
    assert not left["complete"]
    assert "status 1: " in left["results"]["failures"]["topk-others-1of1"]
    (aim,) = (aim for aim in write_report(context).aims if aim.name == "contract tests")
    assert aim.met is False
    assert aim.figure == (
        "passed: none; failed: 0; 1 of 1 shares failed; no test passed on reference"
    )
    report = (tmp_path / "dry-run-report.md").read_text(encoding="utf-8")
    assert "- tests, topk-others-1of1: status 1: " in report
    assert "No module named no_such_pytest" in report


def test_no_test_at_all_is_no_success() -> None:
    # As pytest says where there is nothing to run.
    results = {"tests": summarize({"a": {**nothing(""), "status": 0}}, {})}
    (aim,) = (aim for aim in aims(results) if aim.name == "contract tests")
    assert aim.met is False


def test_a_backend_without_tests_is_named_and_no_success() -> None:
    share = {**nothing(""), "status": 0, "outcomes": {"reference": {"passed": 5, "skipped": 40}}}
    results = {
        "tests": summarize({"a": share}, {"native": None, "triton": "no", "reference": None})
    }
    (aim,) = (aim for aim in aims(results) if aim.name == "contract tests")
    assert aim.met is False
    assert aim.figure == (
        "passed: reference 5; failed: 0; skipped: 40; no test passed on native, triton"
    )


@pytest.mark.parametrize(
    ("named", "hip", "names"),
    [
        (None, None, ["native", "triton", "reference"]),
        (None, "6.4", ["triton", "reference"]),
        ("triton,attic", None, ["triton", "attic"]),
    ],
)
def test_the_backends_of_a_gpu_are_demanded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    hip: str | None,
    names: list[str],
) -> None:
    monkeypatch.setenv("KSAM_TEST_BACKENDS", named or "")
    monkeypatch.setattr("torch.version.hip", hip)
    missing = {"triton": "not installed"}
    monkeypatch.setattr("ksam_kernels.backends.why_not", lambda name, *_: missing.get(name))
    context = Context(torch.device("cuda"), tmp_path, dry_run=False)
    known = {**missing, "attic": "no such backend"}
    assert demanded(context) == {name: known.get(name) for name in names}
    able = [name for name in names if name not in known]
    assert _environment(context)["KSAM_TEST_BACKENDS"] == ",".join(able)


def test_shares_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = [
        sys.executable,
        "-c",
        f"print({OUTPUT.splitlines()[0]!r}, flush=True); import time; time.sleep(60)",
    ]
    monkeypatch.setattr(Share, "command", hang)
    context = Context(CPU, tmp_path, dry_run=True, deadline=time.monotonic() + 4)
    file = PartFile("tests", context)
    run(context, file)
    assert file.results["left_out"] == ["topk-others-1of1"]
    assert file.results["by_backend"] == {"native": {"passed": 1}}


def test_shares_wait_for_a_process_and_are_not_started_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = ("tests/topk/test_topk.py",)
    monkeypatch.setattr("benchmarks.gpu.tests._DRY_SHARES", {"hangs": (share, 1), "b": (share, 1)})
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Share, "command", sleep)
    context = Context(CPU, tmp_path, dry_run=True, deadline=time.monotonic() + 4)
    file = PartFile("tests", context)
    run(context, file)
    statuses = file.results["statuses"]
    assert "ended after" in statuses["hangs-others-1of1"]
    assert statuses["b-others-1of1"] == "not started"
    assert file.results["left_out"] == list(statuses)


def test_shares_that_passed_are_kept_by_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = ("tests/topk/test_topk.py",)
    monkeypatch.setattr("benchmarks.gpu.tests.SHARES", {"a": (share, 1)})
    code = "print('tests/topk/test_topk.py::test_x[native] PASSED')"
    monkeypatch.setattr(Share, "command", [sys.executable, "-c", code])
    context = Context(CPU, tmp_path, dry_run=False)
    passed, failed = {**nothing(""), "status": 0}, {**nothing(""), "status": 1}
    passed["outcomes"] = {"reference": {"passed": 7}}
    earlier = PartFile("tests", context)
    earlier.results = summarize({"a-others-1of2": passed, "a-others-2of2": failed}, {})
    for complete, expected in ((True, {"native": {"passed": 2}}), (False, None)):
        earlier.write(complete=complete)
        file = PartFile("tests", context)
        run(context, file)
        counts = {"native": {"passed": 1}, "reference": {"passed": 7}}
        assert file.results["by_backend"] == (expected or counts)
        assert file.results["statuses"] == {"a-others-1of2": 0, "a-others-2of2": 0}
    # Without time what failed has still failed.
    earlier.write(complete=False)
    file = PartFile("tests", replace(context, deadline=0))
    run(file.context, file)
    assert file.results["statuses"] == {"a-others-1of2": 0, "a-others-2of2": 1}


def test_native_and_reference_come_before_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(CPU, tmp_path, dry_run=False)
    assert {share.selection.group for share in all_shares(context)} == {"others"}
    monkeypatch.setattr("ksam_kernels.backends.why_not", lambda *_: None)
    shares = list(all_shares(context))
    groups = [share.selection.group for share in shares]
    assert groups == sorted(groups)
    assert set(groups) == {"others", "triton"}
    assert len({share.name for share in shares}) == len(shares)


TESTS = """
import pytest

@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_of_backends(backend, n): pass

def test_of_triton(): pass
"""


def test_the_shares_of_a_file_are_all_of_its_tests_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    seen: dict[str, list[str]] = {"others": [], "triton": []}
    for group, first, count in (*(("others", i, 3) for i in range(3)), ("triton", 0, 1)):
        share = Share("it", (str(tmp_path),), Selection(group, first, count))
        options = ["-qq", "--collect-only", "-c", os.devnull, "--rootdir", str(tmp_path)]
        output = subprocess.run(
            [*share.command, *options], capture_output=True, text=True, check=True
        ).stdout
        seen[group] += [line for line in output.splitlines() if "::" in line]
    assert len(seen["others"]) == len(set(seen["others"])) == 7
    assert len(seen["triton"]) == len(set(seen["triton"])) == 3
    assert all("[triton-" in test for test in seen["triton"])


@pytest.mark.parametrize("text", ["native:1/2", "others", "others:1", "others:a/b"])
def test_a_bad_share_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"--share must be .*{text}"):
        Selection.parse(text)
