"""compute-sanitizer's memcheck and racecheck over all kernels of the extension, small tensors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Context, PartFile
from benchmarks.gpu.process import run_for
from benchmarks.gpu.small_case import run_all

TOOLS = ("memcheck", "racecheck")
_TAIL = 3000
_ERRORS_FOUND = 99


def find_tool() -> str | None:
    """compute-sanitizer on the PATH, in $CUDA_HOME or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "compute-sanitizer") for home in homes if home]
    return next(filter(None, map(shutil.which, ["compute-sanitizer", *candidates])), None)


def command(tool: str, check: str) -> list[str]:
    """What runs one check. Only kernels with ksam in their names are watched; others are slow."""
    watched = ["--kernel-regex", "kns=ksam"]
    options = ["--tool", check, "--error-exitcode", str(_ERRORS_FOUND), *watched]
    return [tool, *options, sys.executable, "-m", "benchmarks.gpu.small_case"]


def summarize(returncode: int | None, output: str, seconds: float) -> dict[str, Any]:
    """The verdict: errors found, none, or why it is not known (no status: no time left)."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    completed = "small case: done" in output
    return {
        "clean": returncode == 0 and completed and bool(summary),
        "completed": completed,
        "status": returncode,
        "summary": summary[-1] if summary else None,
        "seconds": round(seconds, 1),
        "output_tail": "" if returncode == 0 else output[-_TAIL:],
    }


def _check(tool: str, check: str, seconds: float) -> dict[str, Any]:
    # Every tensor in memory of its own, so that reading past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "KSAM_BACKEND": "native"}
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        status = run_for(
            seconds, command(tool, check), env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        log.seek(0)
        output = log.read().decode(errors="replace")
    return summarize(status, output, time.monotonic() - start)


def run(context: Context, file: PartFile) -> None:
    """Both checks; where there is no compute-sanitizer, the small case by itself."""
    tool = None if context.dry_run else find_tool()
    if tool is None:
        run_all(context.device)
        file.results["not_run"] = "dry run" if context.dry_run else "no compute-sanitizer found"
        print(f"sanitizer: {file.results['not_run']}; the small case ran without it")
        return
    file.results["left_out"] = []
    for i, check in enumerate(TOOLS):
        seconds = max(context.seconds_left / (len(TOOLS) - i), 1)
        found = file.results[check] = _check(tool, check, seconds)
        print(f"{check}: {'clean' if found['clean'] else found}", flush=True)
        if found["status"] is None:
            file.results["left_out"].append(check)
        file.write(complete=False)
