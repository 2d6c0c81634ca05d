"""A command with a time limit, which ends with everything that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

# What is interrupted has this long to end what it has put into sessions of their own.
_PATIENCE_S = 5.0


def run_for(seconds: float, command: Sequence[str], **options: Any) -> int | None:
    """Run a command in a session of its own; return its status, or None if it was ended.

    Args:
        seconds: how long it may run; then it has :data:`_PATIENCE_S` more.
        options: of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
