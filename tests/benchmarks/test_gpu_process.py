"""Commands with a time limit: what is left of them when it is over."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import process
from benchmarks.gpu.process import run_for
from tests.helpers import assert_ends, wait_for

LONG = 60.0


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_the_status_of_a_command_in_time() -> None:
    assert run_for(LONG, shell("exit 3")) == 3
    assert run_for(LONG, shell("kill -9 $$")) == -9


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    script = f"sleep {LONG} & echo $! > {tmp_path}/pid; wait"
    assert run_for(1.0, shell(script)) is None
    assert_ends(tmp_path / "pid")


def test_what_ignores_the_interrupt_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_PATIENCE_S", 0.2)
    script = f"trap '' INT; echo $$ > {tmp_path}/pid; sleep {LONG} & wait; wait"
    start = time.monotonic()
    assert run_for(1.0, shell(script)) is None
    assert time.monotonic() - start < LONG / 2
    assert_ends(tmp_path / "pid")


_NESTED = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as `gpu --here` does
from benchmarks.gpu.process import run_for
run_for({LONG}, ["/bin/sh", "-c", "echo $$ > " + sys.argv[1] + "; exec sleep {LONG}"])
"""


def test_a_command_can_end_what_is_in_a_session_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _NESTED, str(tmp_path / "pid")]
    assert run_for(3.0, command) is None
    assert_ends(tmp_path / "pid")


def test_an_interrupted_wait_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"echo $$ > {tmp_path}/pid; exec sleep {LONG}"
    wait = process.subprocess.Popen.wait

    def interrupted(self: object, timeout: float | None = None) -> int:
        if timeout == LONG:
            wait_for((tmp_path / "pid").exists)
            raise KeyboardInterrupt
        return wait(self, timeout)  # type: ignore[arg-type]

    monkeypatch.setattr(process.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_for(LONG, shell(script))
    assert_ends(tmp_path / "pid")
