"""The run: its parts one after the other, each in a process of its own, then the report.

An error on a GPU (an illegal address, an assertion) leaves a process unable to use it, and a kernel
that hangs can only be ended with its process; so no part can take the others with it.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu.part import PARTS, Context, PartFile, Run, reason
from benchmarks.gpu.process import run_for
from benchmarks.gpu.report import Report, write_report

# The profiler's own notes stay out of the output; with this much workspace, the library of matrix
# products makes the same choices inside and outside of graphs.
_ENVIRONMENT = {**os.environ, "KINETO_LOG_LEVEL": "99", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run_parts(names: Sequence[str], context: Context) -> bool:
    """Run the parts whose results are not there yet, and write the report after each of them. The
    folder must exist.

    Returns whether all is well by the last report.
    """
    report = Report([], [])
    for name in names:
        file = PartFile(name, context)
        left = file.load()
        if left is not None and left["complete"] and not context.again:
            print(f"{name}: there already ({file.path}); --again repeats it", flush=True)
        elif context.seconds_left < 5:
            print(f"{name}: no time left; run the same command again", flush=True)
        else:
            _run_part(name, context)
        report = write_report(context)
    print()
    for aim in report.aims:
        verdict = {True: "met", False: "MISSED", None: "-"}[aim.met]
        print(f"{verdict:6}  {aim.name}: {aim.figure} (aim: {aim.aim})", flush=True)
    for failure in report.failures:
        print(f"FAILED  {failure}", flush=True)
    print(f"wrote {context.out}/{context.prefix}report.md", flush=True)
    # A dry run has no checks to pass: there is no sanitizer for a CPU.
    return report.all_is_well(() if context.dry_run else names)


def _run_part(name: str, context: Context) -> None:
    what, limit = PARTS[name]
    seconds = min(limit, context.seconds_left)
    print(f"\n== {name}: {what}", flush=True)
    start = time.monotonic()
    if context.dry_run:
        run_in_process(name, replace(context, deadline=start + seconds))
    else:
        _run_in_child(name, context, seconds)
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def _run_in_child(name: str, context: Context, seconds: float) -> None:
    """Run `--only name --here` in a process, which gets some seconds more to stop by itself."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--here", "--only", name]
    command += ["--out", str(context.out), "--minutes", str(seconds / 60)]
    command += ["--again"] if context.again else []
    file = PartFile(name, context)
    before = file.load()
    status = run_for(seconds + 20, command, env=_ENVIRONMENT)
    if status != 0:
        failure = f"its process ended with status {status}"
        if status is None:
            failure = f"its process was ended after {seconds + 20:.0f} s"
        print(f"{name}: {failure}", flush=True)
        after = file.load()
        if after is None or after == before or "failure" not in after["results"]:
            file.fail(failure)  # else the part itself has written why


def run_in_process(name: str, context: Context) -> None:
    """Run one part here. What it raises is its result: a traceback, and a file that says so."""
    file = PartFile(name, context)
    try:
        run: Run = importlib.import_module(f"benchmarks.gpu.{name}").run
        run(context, file)
    except Exception as error:
        file.fail(reason(error))
        raise
    # What failed is worth another try by the next run, like what there was no time for.
    file.write(complete=not (file.results.get("left_out") or file.results.get("failures")))
