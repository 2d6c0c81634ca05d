"""Warnings that point at the user's line, whatever called in between."""

from __future__ import annotations

import sys
import warnings

#: Modules whose frames are none of the user's.
_OURS = ("ksam.", "ksam_kernels.", "torch.", "contextlib")


def warn(message: str) -> None:
    """Issue a UserWarning at the line of the user's code that led here."""
    level = 1
    frame = sys._getframe(level)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
