"""Every contract test runs once per backend that is installed; the summary counts them.

A backend that cannot run has no tests rather than skipped ones, and the last lines of the run say
how many contract tests passed on each, so that a backend that is missing cannot read as passed.
``KSAM_TEST_BACKENDS=native,reference`` demands backends: one that is missing fails the run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from ksam_kernels import backends, use_backend
from tests.simt import backend as simt

_demanded = [name for name in os.environ.get("KSAM_TEST_BACKENDS", "").split(",") if name]
_ran: Counter[str] = Counter()


def _missing(name: str) -> str | None:
    """Why the backend runs none of the operators on the CPU; None if it runs some."""
    cpu = torch.device("cpu")
    operators = [op for names in backends.OPERATORS.values() for op in names]
    reasons = [backends.why_not(name, op, cpu) for op in operators]
    return reasons[0] if all(reasons) else None


MISSING = {name: _missing(name) for name in backends.BACKENDS} | {simt.NAME: simt.MISSING}
INSTALLED = [name for name, reason in MISSING.items() if reason is None]


def pytest_sessionstart(session: pytest.Session) -> None:
    for name in _demanded:
        if MISSING.get(name, "no such backend") is not None:
            raise pytest.UsageError(f"KSAM_TEST_BACKENDS asks for {name}: {MISSING.get(name)}")


@pytest.fixture(params=INSTALLED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend in force for this test."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        # Test ids read test_name[backend-…]; the backend fixture comes first or alone.
        parameters = report.nodeid.partition("[")[2].rstrip("]").split("-")
        _ran.update(name for name in MISSING if name in parameters)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("contract tests passed per backend")
    for name, reason in MISSING.items():
        terminalreporter.write_line(
            f"{name}: {_ran[name] if reason is None else f'none, {reason}'}"
        )
