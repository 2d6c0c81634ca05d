"""The run: its parts one after the other, each in a process of its own, then the report.

An error on a GPU (an illegal address, an assertion) leaves a process unable to use it, and a kernel
that hangs can only be ended with its process; so no part can take the others with it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu.aims import Aim
from benchmarks.gpu.part import Context, PartFile, Run, reason
from benchmarks.gpu.report import write_report

# part: (what it does, the most seconds it gets). In the order of the run: what is quick comes
# first, and of the rest what matters most.
PARTS = {
    "build": ("versions, architectures built, backends, the GPU", 40),
    "sync": ("steps in which waiting for the GPU is an error", 40),
    "graph": ("a step captured in a CUDA graph, replayed, compared bit for bit", 60),
    "launches": ("kernels launched per operation and per step, from the profiler", 60),
    "host": ("host time of the calls of a step", 40),
    "training": ("whole training steps: SGD, SAM and K-SAM", 70),
    "kernels": ("times against PyTorch, percent of the bandwidth of a copy", 240),
    "sanitizer": ("memcheck and racecheck over every kernel", 100),
    "tests": ("the contract tests on the GPU", 300),
}

# The profiler's own notes stay out of the output; a library of matrix products that has this much
# workspace chooses alike inside and outside of graphs.
_ENVIRONMENT = {**os.environ, "KINETO_LOG_LEVEL": "99", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run_parts(names: Sequence[str], context: Context, *, again: bool) -> None:
    """Run the parts that are not there yet, and write the report after each of them."""
    context.out.mkdir(parents=True, exist_ok=True)
    aims: list[Aim] = []
    for name in names:
        file = PartFile(name, context)
        left = file.load()
        if left is not None and left["complete"] and not again:
            print(f"{name}: there already ({file.path}); --again repeats it", flush=True)
        elif context.seconds_left < 5:
            print(f"{name}: no time left; run the same command again", flush=True)
        else:
            _run_part(name, context)
        aims = write_report(context)
    print()
    for aim in aims:
        verdict = {True: "met", False: "MISSED", None: "-"}[aim.met]
        print(f"{verdict:6}  {aim.name}: {aim.figure} (aim: {aim.aim})", flush=True)
    print(f"wrote {context.out}/{context.prefix}report.md", flush=True)


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
    file = PartFile(name, context)
    before = file.load()
    try:
        failure = None
        returned = subprocess.run(
            command, env=_ENVIRONMENT, check=False, timeout=seconds + 20
        ).returncode
        if returned != 0:
            failure = f"its process ended with status {returned}"
    except subprocess.TimeoutExpired:
        failure = f"its process was ended after {seconds + 20:.0f} s"
    if failure is not None:
        print(f"{name}: {failure}", flush=True)
        after = file.load()
        # What it wrote until then stays; where it wrote nothing, the failure itself is the result.
        file.results = after["results"] if after is not None and after != before else {}
        file.results["failure"] = failure
        file.write(complete=False)


def run_in_process(name: str, context: Context) -> None:
    """Run one part here. What it raises is its result: a traceback, and a file that says so."""
    run: Run = importlib.import_module(f"benchmarks.gpu.{name}").run
    file = PartFile(name, context)
    try:
        run(context, file)
    except Exception as error:
        file.results["failure"] = reason(error)
        file.write(complete=False)
        raise
    file.write(complete=file.results.get("left_out") in (None, []))
