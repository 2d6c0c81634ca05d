"""``python -m ksam_kernels``: which backend runs each operator, and why a better one does not."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ksam_kernels import use_backend
from ksam_kernels.__main__ import main
from tests.helpers import OPERATORS, run_python


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_report_knows_another_backend_that_was_named(
    extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend(extra):
        code, facts = report(capsys)
    assert code == 1
    entries = {entry["operator"]: entry for entry in facts["operators"] if entry["device"] == "cpu"}
    assert entries["topk_indices"]["runs"] == "another"
    assert entries["topk_indices"]["passed_over"]["reference"] == "another was asked for by name"
    assert entries["mse"]["passed_over"]["another"] == "it has no mse kernel for cpu"


def test_python_m_ksam_kernels_prints_a_row_per_operator() -> None:
    result = run_python("-m", "ksam_kernels", backend="reference")
    assert result.returncode == 0, result.stderr
    assert "backend asked for: reference" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    for room, operator in OPERATORS:
        assert ["cpu", room, operator, "reference"] in [row[:4] for row in rows]


@pytest.mark.usefixtures("only_reference")
def test_the_report_names_every_operator_and_why_better_backends_do_not_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, facts = report(capsys)
    assert code == 0
    assert facts["requested"] == "auto"
    assert facts["torch"] == torch.__version__
    on_cpu = [entry for entry in facts["operators"] if entry["device"] == "cpu"]
    assert [(entry["room"], entry["operator"]) for entry in on_cpu] == OPERATORS
    for entry in on_cpu:
        assert entry["runs"] == "reference"
        assert list(entry["passed_over"]) == ["native", "triton"]
        assert all("this installation has no" in why for why in entry["passed_over"].values())


def test_the_report_tells_a_missing_kernel_from_a_missing_backend(
    half_native: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts = report(capsys)
    assert code == 0
    entries = {entry["operator"]: entry for entry in facts["operators"] if entry["device"] == "cpu"}
    assert entries["topk_indices"]["runs"] == "native"
    assert entries["topk_indices"]["passed_over"] == {}
    assert entries["mse"]["runs"] == "reference"
    assert entries["mse"]["passed_over"]["native"] == "it has no mse kernel for cpu"


@pytest.mark.parametrize(
    ("built", "line"),
    [
        ("", "compiled extension: CPU (avx2), no CUDA kernels"),
        ("80 90+PTX", "compiled extension: CPU (avx2), CUDA (sm_80, sm_90+PTX)"),
        (None, "no compiled extension"),
    ],
    ids=["CPU", "CUDA", "none"],
)
def test_the_report_says_what_was_built(
    built: str | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extension = SimpleNamespace(cpu_isa="avx2", cuda_architectures=built, compiler="13")
    monkeypatch.setattr("ksam_kernels.__main__.extension", None if built is None else extension)
    main([])
    assert capsys.readouterr().out.splitlines()[1] == line
    _, facts = report(capsys)
    if built is None:
        assert facts["extension"] is None
    else:
        assert facts["extension"]["cuda_architectures"] == built.split()


def test_the_report_says_that_the_reference_was_asked_for(
    half_native: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend("reference"):
        code, facts = report(capsys)
    assert code == 0
    entry = next(e for e in facts["operators"] if e["operator"] == "topk_indices")
    assert entry["passed_over"]["native"] == "reference was asked for by name"


def test_the_exit_code_is_1_when_the_named_backend_cannot_run_something(
    half_native: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend("native"):
        code, facts = report(capsys)
        assert code == 1
        assert facts["requested"] == "native"
        runs = {entry["operator"]: entry["runs"] for entry in facts["operators"]}
        assert runs["topk_indices"] == "native"
        assert runs["mse"] is None
        assert main([]) == 1
    text = capsys.readouterr().out
    assert "raises" in text
    assert "not native: it has no mse kernel for cpu" in text


def test_python_m_ksam_kernels_exits_with_1_for_a_backend_that_cannot_run() -> None:
    result = run_python("-m", "ksam_kernels", "--json", backend="triton")
    assert result.returncode == 1, result.stderr
    assert all(e["runs"] is None for e in json.loads(result.stdout)["operators"]
               if e["device"] == "cpu")  # fmt: skip
