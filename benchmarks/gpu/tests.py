"""The contract tests with ``KSAM_TEST_DEVICE``, in processes side by side, each with a share.

Shares are small and wait in a queue. As many processes as the machine has cores, less two, take
them from it: first those of the native backend and the reference, then those of Triton, which take
longer because its kernels are compiled meanwhile. A process that hangs, crashes or is cut off
loses only the tests of its share that it did not reach. A run that goes on where an earlier one was
cut off does not repeat the shares that passed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Context, PartFile
from benchmarks.gpu.share import GROUPS, Selection, backend_of
from ksam_kernels import backends

_ROOT = Path(__file__).parent.parent.parent

# room: (what pytest is told, shares of it per backend), the most telling first. Shares take about
# as long as each other; starting a process takes seconds, so there are no more than balance needs.
SHARES: dict[str, tuple[tuple[str, ...], int]] = {
    "loss": (("tests/loss",), 4),
    "compact": (("tests/test_device_assertions.py", "tests/compact"), 3),
    "perturb": (("tests/perturb",), 8),
    "operators": (("tests/test_operators.py",), 4),
    "ksam": (("tests/ksam", "tests/topk"), 8),
    "others": (("tests/test_native.py", "tests/test_negative.py", "tests/test_docs.py"), 1),
    "fuzz-loss": (("tests/fuzz/test_fuzz_loss.py",), 4),
    "fuzz-perturb": (("tests/fuzz/test_fuzz_perturb.py",), 5),
    "fuzz-others": (("tests/fuzz/test_fuzz_compact.py", "tests/fuzz/test_fuzz_topk.py"), 1),
}
_DRY_SHARES = {"topk": (("tests/topk/test_topk.py", "-k", "no_losses"), 1)}

_OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_TAIL = 4000
_NO_TESTS = 5  # pytest's status where a share has no tests


@dataclass(frozen=True)
class Share:
    """What one process runs."""

    room: str
    arguments: tuple[str, ...]
    selection: Selection

    @property
    def name(self) -> str:
        """The share's name, which its log bears too."""
        group, first, count = self.selection
        return f"{self.room}-{group}-{first + 1}of{count}"

    @property
    def command(self) -> list[str]:
        """The command: pytest prints a line for every test, and short tracebacks of failures."""
        options = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "--maxfail=25"]
        # In an order that pytest-randomly draws anew, the shares of a file would not add up to it.
        share = ["-p", "no:randomly", "-p", "benchmarks.gpu.share", "--share", str(self.selection)]
        return [sys.executable, "-m", "pytest", *options, *share, *self.arguments]


def _must_have_tests(context: Context) -> Sequence[str]:
    """The backends of KSAM_TEST_BACKENDS, or all that such a device can have."""
    named = os.environ.get("KSAM_TEST_BACKENDS")
    if named:
        return named.split(",")
    if context.device.type != "cuda":  # a dry run, which is not about what is built
        return ("reference",)
    return backends.BACKENDS if torch.version.hip is None else ("triton", "reference")


def demanded(context: Context) -> dict[str, str | None]:
    """The backends that must have tests, and why they cannot have any; None: they can."""
    return {
        name: backends.why_not(name, "restore_", context.device)
        if name in backends.BACKENDS
        else "no such backend"
        for name in _must_have_tests(context)
    }


def all_shares(context: Context) -> Iterator[Share]:
    """The queue: Triton's come last, if it runs there."""
    table = _DRY_SHARES if context.dry_run else SHARES
    for group in GROUPS:
        if group == "triton" and backends.why_not("triton", "restore_", context.device) is not None:
            continue
        for room, (arguments, count) in table.items():
            many = count if group == "triton" or context.dry_run else 2 * count  # two backends
            for first in range(many):
                yield Share(room, arguments, Selection(group, first, many))


@dataclass
class Tally:
    """What the lines of a share's output add up to."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)  # by backend
    failed: list[str] = field(default_factory=list)
    left_out: int = 0  # tests that have no form on the device

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


def _environment(context: Context) -> dict[str, str]:
    environment = {**os.environ, "KSAM_TEST_DEVICE": context.device.type, "OMP_NUM_THREADS": "1"}
    # Without those that the summary says are missing: the others have tests all the same.
    able = [name for name, why in demanded(context).items() if why is None]
    environment["KSAM_TEST_BACKENDS"] = ",".join(able)
    paths = [str(_ROOT), str(_ROOT / "python_api"), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100"}


def _start(share: Share, log: Path, context: Context) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            share.command,
            cwd=_ROOT,
            env=_environment(context),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def run(context: Context, file: PartFile) -> None:
    """All shares, some at once; at the deadline those still running are ended, others left out."""
    shares = list(all_shares(context))
    wanted = demanded(context)
    before = file.unfinished().get("shares", {})
    found = {share.name: before.get(share.name, nothing("not started")) for share in shares}
    queue = [share for share in shares if found[share.name]["status"] != 0]
    workers = max((os.cpu_count() or 1) - 2, 1)
    if len(queue) < len(shares):
        print(f"tests: {len(shares) - len(queue)} shares passed before", flush=True)
    print(f"tests: {len(queue)} shares, {workers} at a time", flush=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    started: dict[str, float] = {}
    while queue or running:
        ended = context.seconds_left < 3
        if ended:
            queue.clear()
        while queue and len(running) < workers:
            share = queue.pop(0)
            running[share.name] = _start(share, _log(share.name, context), context)
            started[share.name] = time.monotonic()
        for name, process in list(running.items()):
            status: int | str | None = process.poll()
            seconds = time.monotonic() - started[name]
            if status is None and ended:
                process.kill()
                process.wait()
                status = f"ended after {seconds:.0f} s"
            if status is not None:
                del running[name]
                found[name] = read_log(_log(name, context), status)
                print(f"tests, {name}: {_describe(status)}, {seconds:.0f} s", flush=True)
                file.results = summarize(found, wanted)
                file.write(complete=False)
        time.sleep(0.05)
    file.results = summarize(found, wanted)
    _print(file.results)


def _log(name: str, context: Context) -> Path:
    return context.out / f"{context.prefix}tests-{name}.log"


def _describe(status: int | str) -> str:
    return "passed" if status == 0 else "FAILED" if status == 1 else f"status {status}"


def nothing(status: str) -> dict[str, Any]:
    """The results of a share that did not run."""
    return {"status": status, "outcomes": {}, "failed": [], "left_out": 0, "output_tail": ""}


def read_log(log: Path, status: int | str) -> dict[str, Any]:
    """What a share found; its log stays if it failed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    tally = Tally()
    for line in text.splitlines():
        tally.read(line)
    if status in (0, _NO_TESTS):
        status = 0
        log.unlink()
    return {
        "status": status,
        "outcomes": {name: dict(counts) for name, counts in tally.outcomes.items()},
        "failed": tally.failed,
        "left_out": tally.left_out,
        "output_tail": "" if status == 0 else text[-_TAIL:],
    }


def _why(share: dict[str, Any]) -> str | None:
    """What failed in a share: tests, or the process itself; None: nothing, as far as it came."""
    if share["failed"]:
        return f"{len(share['failed'])} failed, the first {share['failed'][0]}"
    if share["status"] == 0 or isinstance(share["status"], str):
        return None
    last = share["output_tail"].strip().rpartition("\n")[2]
    return f"status {share['status']}: {last}"


def summarize(
    shares: dict[str, dict[str, Any]], wanted: Mapping[str, str | None]
) -> dict[str, Any]:
    """Counts over the shares, and the end of the output of those that failed. A backend that is
    wanted and cannot run is a failure, too."""
    by_backend: dict[str, Counter[str]] = {}
    for share in shares.values():
        for backend, outcomes in share["outcomes"].items():
            by_backend.setdefault(backend, Counter()).update(outcomes)
    failures = {**wanted, **{name: _why(share) for name, share in shares.items()}}
    return {
        "statuses": {name: share["status"] for name, share in shares.items()},
        "demanded": list(wanted),
        "failures": {name: why for name, why in failures.items() if why is not None},
        "by_backend": {name: dict(counts) for name, counts in sorted(by_backend.items())},
        "failed": [test for share in shares.values() for test in share["failed"]],
        "without_form_on_device": sum(share["left_out"] for share in shares.values()),
        "left_out": [name for name, share in shares.items() if isinstance(share["status"], str)],
        "shares": shares,
    }


def _print(results: dict[str, Any]) -> None:
    for backend, counts in results["by_backend"].items():
        print(f"  {backend:10} {counts}")
    for test in results["failed"]:
        print(f"  failed: {test}")
    for name, why in results["failures"].items():
        print(f"  {name}: {why}")
    for name in results["left_out"]:
        print(f"  {results['statuses'][name]}: {name}")
