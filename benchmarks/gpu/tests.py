"""The contract tests with ``KSAM_TEST_DEVICE``, in processes side by side, each with its share.

Their output is read as it comes, a line per test, so that a process that hangs or is cut off loses
only the tests that it did not reach.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Context, PartFile

_ROOT = Path(__file__).parent.parent.parent
_BACKENDS = ("native", "triton", "reference")

# Shares of about the same length; what takes longest first.
SHARES: dict[str, tuple[str, ...]] = {
    "fuzz-perturb": ("tests/fuzz/test_fuzz_perturb.py",),
    "fuzz-loss": ("tests/fuzz/test_fuzz_loss.py",),
    "fuzz-others": ("tests/fuzz/test_fuzz_compact.py", "tests/fuzz/test_fuzz_topk.py"),
    "perturb": ("tests/perturb",),
    "loss": ("tests/loss",),
    "ksam": ("tests/ksam", "tests/topk"),
    "compact": ("tests/compact", "tests/test_device_assertions.py"),
    "operators": ("tests/test_operators.py",),
}
_DRY_SHARES = {"topk": ("tests/topk/test_topk.py", "-k", "no_losses")}

_OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_TAIL = 4000


@dataclass
class Tally:
    """What the lines of a share's output add up to."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)  # by backend
    failed: list[str] = field(default_factory=list)
    left_out: int = 0  # tests that the device has no form of

    def read(self, line: str) -> None:
        """Count a line of pytest -v."""
        match = _OUTCOME.match(line)
        if match:
            test, outcome = match.groups()
            self.outcomes.setdefault(backend_of(test), Counter())[outcome.lower()] += 1
            if outcome in ("FAILED", "ERROR"):
                self.failed.append(test)
        elif line.startswith("left out on "):
            self.left_out += int(re.findall(r": (\d+)\.", line)[0])

    def add(self, other: Tally) -> None:
        """Count another share's as well."""
        for backend, outcomes in other.outcomes.items():
            self.outcomes.setdefault(backend, Counter()).update(outcomes)
        self.failed += other.failed
        self.left_out += other.left_out


def backend_of(test: str) -> str:
    """The backend in a test's parameters; "no backend" where it takes none."""
    parameters = test.partition("[")[2].rstrip("]").split("-")
    return next((name for name in _BACKENDS if name in parameters), "no backend")


def command(arguments: Sequence[str]) -> list[str]:
    """What runs a share: every test a line, failures with short tracebacks."""
    options = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "--maxfail=25"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def _environment(context: Context) -> dict[str, str]:
    environment = {**os.environ, "KSAM_TEST_DEVICE": context.device.type, "OMP_NUM_THREADS": "2"}
    paths = [str(_ROOT), str(_ROOT / "python_api"), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100"}


def run(context: Context, file: PartFile) -> None:
    """All shares at once; at the deadline those that still run are ended."""
    shares = _DRY_SHARES if context.dry_run else SHARES
    logs = {name: context.out / f"{context.prefix}tests-{name}.log" for name in shares}
    running: dict[str, subprocess.Popen[bytes]] = {}
    for name, arguments in shares.items():
        with logs[name].open("wb") as log:
            running[name] = subprocess.Popen(
                command(arguments),
                cwd=_ROOT,
                env=_environment(context),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    start = time.monotonic()
    statuses: dict[str, int | str] = {}
    while running:
        for name, process in list(running.items()):
            status: int | str | None = process.poll()
            if status is None and context.seconds_left < 3:
                process.kill()
                process.wait()
                status = f"ended after {time.monotonic() - start:.0f} s"
            if status is not None:
                statuses[name] = status
                del running[name]
                print(f"tests, {name}: {_describe(status)}", flush=True)
                file.results = summarize(statuses, logs)
                file.write(complete=False)
        time.sleep(0.2)
    for name, path in logs.items():
        if statuses[name] == 0:
            path.unlink()
    _print(file.results)


def _describe(status: int | str) -> str:
    return "passed" if status == 0 else "FAILED" if status == 1 else f"status {status}"


def summarize(statuses: dict[str, int | str], logs: dict[str, Path]) -> dict[str, Any]:
    """Counts over the shares that have ended, and the end of the output of those that failed."""
    whole = Tally()
    tails: dict[str, str] = {}
    for name, status in statuses.items():
        text = logs[name].read_text(encoding="utf-8", errors="replace")
        tally = Tally()
        for line in text.splitlines():
            tally.read(line)
        whole.add(tally)
        if status != 0:
            tails[name] = text[-_TAIL:]
    return {
        "statuses": statuses,
        "by_backend": {name: dict(counts) for name, counts in sorted(whole.outcomes.items())},
        "failed": whole.failed,
        "without_form_on_device": whole.left_out,
        "left_out": [name for name, status in statuses.items() if isinstance(status, str)],
        "output_tails": tails,
    }


def _print(results: dict[str, Any]) -> None:
    for backend, counts in results["by_backend"].items():
        print(f"  {backend:10} {counts}")
    for test in results["failed"]:
        print(f"  failed: {test}")
