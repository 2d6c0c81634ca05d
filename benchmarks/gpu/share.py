"""A plugin of pytest: ``-p benchmarks.gpu.share --share GROUP:I/N`` runs a share of the tests.

It keeps every Nth, from the Ith on, of the tests with a backend of the group: ``triton``, its
interpreter among them, or ``others``: all that are not Triton's, those without a backend among
them. So neighbours, which take about as long as each other, come to different shares.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

BACKENDS = ("native", "triton", "reference")
GROUPS = ("others", "triton")


class Selection(NamedTuple):
    """What ``--share`` says."""

    group: str
    first: int  # from 0
    parts: int

    def __str__(self) -> str:
        return f"{self.group}:{self.first + 1}/{self.parts}"

    @staticmethod
    def parse(text: str) -> Selection:
        """The inverse of ``str``."""
        group, _, part = text.partition(":")
        first, _, parts = part.partition("/")
        if group not in GROUPS or not (first.isdigit() and parts.isdigit()):
            raise pytest.UsageError(f"--share must be GROUP:I/N, of {GROUPS}, got {text!r}")
        return Selection(group, int(first) - 1, int(parts))


def backend_of(test: str) -> str:
    """The backend in a test's parameters; "no backend" where it takes none."""
    parameters = test.partition("[")[2].rstrip("]").split("-")
    return next((name for name in BACKENDS if name in parameters), "no backend")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption("--share", type=Selection.parse, help="GROUP:I/N, see benchmarks/gpu/share.py")


# First, as the tests' own hook counts those with no form on the device: each share counts its own.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the share."""
    share: Selection | None = config.getoption("--share")
    if share is None:
        return
    group = [i for i in items if (backend_of(i.nodeid) == "triton") == (share.group == "triton")]
    kept = group[share.first :: share.parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
