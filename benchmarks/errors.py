"""Errors that are the user's to fix, reported in one sentence and without a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class UsageError(Exception):
    """A mistake in the arguments, the files they name, or the installed packages."""


def import_optional(module: str, *, package: str, needed_by: str) -> ModuleType | Any:
    """Import `module`, or raise a UsageError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{needed_by} needs the package {package} (pip install {package}): {error}"
        ) from error
