"""Commands with a time limit: what is left of them when it is over."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import process
from benchmarks.gpu.process import run_for
from tests.helpers import assert_ends

LONG = 60.0


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_the_status_of_a_command_in_time() -> None:
    assert run_for(LONG, shell("exit 3")) == 3
    assert run_for(LONG, shell("kill -9 $$")) == -9


def test_what_a_command_started_ends_with_it(pid_file: Path) -> None:
    assert run_for(0.1, shell(f"sleep {LONG} & echo $! > {pid_file}; wait")) is None
    assert_ends(pid_file)


def test_what_ignores_the_interrupt_is_killed(
    pid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_PATIENCE_S", 0.2)
    script = f"trap '' INT; echo $$ > {pid_file}; sleep {LONG} & wait; wait"
    start = time.monotonic()
    assert run_for(0.1, shell(script)) is None
    assert time.monotonic() - start < LONG / 2
    assert_ends(pid_file)


_NESTED = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as `gpu --here` does
from benchmarks.gpu.process import run_for
run_for({LONG}, ["/bin/sh", "-c", "echo $$ > " + sys.argv[1] + "; exec sleep {LONG}"])
"""


def test_a_command_can_end_what_is_in_a_session_of_its_own(pid_file: Path) -> None:
    assert run_for(0.5, [sys.executable, "-c", _NESTED, str(pid_file)]) is None
    assert_ends(pid_file)


def test_an_interrupted_wait_ends_the_command(
    pid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[str], timeout: float | None = None) -> int:
        if timeout != LONG:
            return wait(self, timeout)
        with pytest.raises(subprocess.TimeoutExpired):
            wait(self, 0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_for(LONG, shell(f"echo $$ > {pid_file}; exec sleep {LONG}"))
    assert_ends(pid_file)
