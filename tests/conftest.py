"""Every contract test runs once per backend that is installed; the summary counts them.

A backend that cannot run has no tests rather than skipped ones, and the last lines of the run say
how many contract tests passed on each, so that a backend that is missing cannot read as passed.
``KSAM_TEST_BACKENDS=native,reference`` demands backends: one that is missing fails the run.
``KSAM_TEST_DEVICE=cuda`` runs the contract tests on tensors there; see tests/device.py.
"""

from __future__ import annotations

import tests.triton.interpreter  # noqa: F401  # before ksam_kernels  # isort: skip

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from ksam_kernels import backends, use_backend
from tests import device
from tests.simt import backend as simt
from tests.triton import backend as triton
from tests.triton import left_out

device.use_device_of_tests()  # before any module of tests is imported, and creates its tensors

_demanded = [name for name in os.environ.get("KSAM_TEST_BACKENDS", "").split(",") if name]
_ran: Counter[str] = Counter()
_left_out: list[pytest.Item] = []
_not_interpreted: Counter[str] = Counter()

# On the CPU the rooms' own tests have these cases, without processes that take seconds to start.
collect_ignore = [] if "KSAM_TEST_DEVICE" in os.environ else ["test_device_assertions.py"]
# Kernels of the interpreter cannot be compiled, nor can any without Triton.
collect_ignore_glob = [] if triton.CAN_COMPILE else ["triton/test_*"]


def _missing(name: str) -> str | None:
    """Why the backend runs none of the operators on the tests' device; None if it runs some."""
    operators = [op for names in backends.OPERATORS.values() for op in names]
    reasons = [backends.why_not(name, op, device.DEVICE) for op in operators]
    return reasons[0] if all(reasons) else None


MISSING = {name: _missing(name) for name in backends.BACKENDS}
MISSING[simt.NAME] = simt.MISSING if device.DEVICE.type == "cpu" else "it runs on the CPU only"
MISSING[triton.NAME] = triton.MISSING if device.DEVICE.type == "cpu" else "it runs on the CPU only"
INSTALLED = [name for name, reason in MISSING.items() if reason is None]


def _parameters(node_id: str) -> str:
    """``-backend-…-`` of test_name[backend-…]; the backend fixture comes first or alone."""
    return f"-{node_id.partition('[')[2].rstrip(']')}-"


def pytest_sessionstart(session: pytest.Session) -> None:
    for name in _demanded:
        if MISSING.get(name, "no such backend") is not None:
            raise pytest.UsageError(f"KSAM_TEST_BACKENDS asks for {name}: {MISSING.get(name)}")


def _leave_out_of_the_interpreter(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        item: reason
        for item in items
        if f"-{triton.NAME}-" in _parameters(item.nodeid)
        and (reason := left_out.why(item.nodeid)) is not None
    }
    _not_interpreted.update(reasons.values())
    config.hook.pytest_deselected(items=list(reasons))
    items[:] = [item for item in items if item not in reasons]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out_of_the_interpreter(config, items)
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


@pytest.fixture
def native() -> Iterator[None]:
    """Put the compiled kernels in force: for tests of what is true of them alone."""
    if MISSING["native"] is not None:
        pytest.skip(MISSING["native"])
    with use_backend("native"):
        yield


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation without compiled extension and Triton, with no backend asked for."""
    monkeypatch.setattr(backends, "_choices", [["auto"]])
    for name in ("native", "triton"):
        monkeypatch.setitem(backends._kernels, name, {})


@pytest.fixture
def half_native(only_reference: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A native backend with one operator, which notes its calls."""
    calls = []

    def topk_indices(losses: torch.Tensor, k: int) -> torch.Tensor:
        calls.append("native")
        return torch.arange(k)

    monkeypatch.setitem(backends._kernels, "native", {"topk_indices": topk_indices})
    return calls


@pytest.fixture
def extra(only_reference: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is not one of BACKENDS, with one operator."""
    monkeypatch.setattr(backends, "_kernels", dict(backends._kernels))

    @backends.implements("another", "topk_indices")
    def topk_indices(losses: torch.Tensor, k: int) -> torch.Tensor:
        return torch.arange(k)

    return "another"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        parameters = _parameters(report.nodeid)
        for name in sorted(MISSING, key=len, reverse=True):  # triton-interpreter is not triton
            _ran[name] += f"-{name}-" in parameters
            parameters = parameters.replace(f"-{name}-", "--")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"contract tests passed per backend, on {device.DEVICE}")
    for name, reason in MISSING.items():
        terminalreporter.write_line(
            f"{name}: {_ran[name] if reason is None else f'none, {reason}'}"
        )
    for reason, count in _not_interpreted.items():
        terminalreporter.write_line(f"left out of {triton.NAME}: {count}, {reason}")
    if not triton.CAN_COMPILE:
        why = triton.MISSING or "not while the interpreter is demanded"
        terminalreporter.write_line(f"compile tests of Triton kernels: none, {why}")
    if _left_out:
        terminalreporter.write_line(
            f"left out on {device.DEVICE}: {len(_left_out)}. {device.ASSERTS}"
        )
