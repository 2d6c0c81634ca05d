"""Every contract test runs once per backend that is installed; the summary counts them.

A backend that cannot run has no tests rather than skipped ones, and the last lines of the run say
how many contract tests passed on each, so that a backend that is missing cannot read as passed.
``KSAM_TEST_BACKENDS=native,reference`` demands backends: one that is missing fails the run.
``KSAM_TEST_DEVICE=cuda`` runs the contract tests on tensors there; see tests/device.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from ksam_kernels import backends, use_backend
from tests import device
from tests.simt import backend as simt

device.use_device_of_tests()  # before any module of tests is imported, and creates its tensors

_demanded = [name for name in os.environ.get("KSAM_TEST_BACKENDS", "").split(",") if name]
_ran: Counter[str] = Counter()
_left_out: list[pytest.Item] = []

# On the CPU the rooms' own tests have these cases, without processes that take seconds to start.
collect_ignore = [] if "KSAM_TEST_DEVICE" in os.environ else ["test_device_assertions.py"]


def _missing(name: str) -> str | None:
    """Why the backend runs none of the operators on the tests' device; None if it runs some."""
    operators = [op for names in backends.OPERATORS.values() for op in names]
    reasons = [backends.why_not(name, op, device.DEVICE) for op in operators]
    return reasons[0] if all(reasons) else None


MISSING = {name: _missing(name) for name in backends.BACKENDS}
MISSING[simt.NAME] = simt.MISSING if device.DEVICE.type == "cpu" else "it runs on the CPU only"
INSTALLED = [name for name, reason in MISSING.items() if reason is None]


def pytest_sessionstart(session: pytest.Session) -> None:
    for name in _demanded:
        if MISSING.get(name, "no such backend") is not None:
            raise pytest.UsageError(f"KSAM_TEST_BACKENDS asks for {name}: {MISSING.get(name)}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if device.DEVICE.type == "cpu":
        return
    _left_out.extend(filter(device.provokes_assertion, items))
    config.hook.pytest_deselected(items=_left_out)
    items[:] = [item for item in items if not device.provokes_assertion(item)]


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
    terminalreporter.section(f"contract tests passed per backend, on {device.DEVICE}")
    for name, reason in MISSING.items():
        terminalreporter.write_line(
            f"{name}: {_ran[name] if reason is None else f'none, {reason}'}"
        )
    if _left_out:
        terminalreporter.write_line(
            f"left out on {device.DEVICE}: {len(_left_out)}. {device.ASSERTS}"
        )
