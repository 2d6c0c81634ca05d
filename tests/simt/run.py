"""Runs contract tests on the runner: ``python -m tests.simt.run [--sanitize NAMES] [PYTEST]``.

Builds it first. Races show with ``--sanitize thread``, bounds and alignment with
``--sanitize address,undefined``. ``--program`` runs every kernel once instead of the tests
(every_kernel/main.cpp), which is all that there is for ``--sanitize memory``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.simt import build

_LIBRARIES = {"address,undefined": "asan", "thread": "tsan"}
SANITIZERS = (*_LIBRARIES, "memory")


def _environment(sanitize: str, *, program: bool) -> dict[str, str]:
    """Python itself is not instrumented: the sanitizer's library has to be there before it."""
    environment = os.environ | {
        "KSAM_TEST_BACKENDS": "simt",
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
    }
    if program or sanitize not in _LIBRARIES:
        return environment
    name = f"libclang_rt.{_LIBRARIES[sanitize]}-x86_64.so"
    command = [str(build.compiler()), f"-print-file-name={name}"]
    library = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(library).is_file():
        raise RuntimeError(f"{build.compiler()} has no {name}")
    return environment | {"KSAM_SIMT_SANITIZE": sanitize, "LD_PRELOAD": library}


def command(sanitize: str, arguments: list[str], *, program: bool) -> list[str]:
    """pytest on the runner's backend alone, or the program."""
    run = [sys.executable, "-m", "pytest", "-q", "-k", "simt", *arguments]
    if program:
        run = [str(build.output(sanitize, program=True))]
    # ThreadSanitizer wants addresses that the operating system's randomization may take.
    return ["setarch", "-R", *run] if sanitize == "thread" else run


def run(
    sanitize: str,
    arguments: list[str],
    *,
    program: bool = False,
    seed: int = 1,
    timeout: float | None = None,
    **options: bool,
) -> subprocess.CompletedProcess[str]:
    """Run the tests on the runner as it is built; status 66: ThreadSanitizer found a race."""
    environment = _environment(sanitize, program=program) | {"KSAM_SIMT_SEED": str(seed)}
    return subprocess.run(
        command(sanitize, arguments, program=program),
        check=False,
        cwd=build.ROOT,
        env=environment,
        text=True,
        timeout=timeout,
        **options,  # type: ignore[arg-type]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="", choices=("", *SANITIZERS))
    parser.add_argument("--program", action="store_true", help="every kernel once, not the tests")
    parser.add_argument("--seed", type=int, default=1, help="of the order of threads")
    options, arguments = parser.parse_known_args()
    build.build(options.sanitize, program=options.program)
    ran = run(options.sanitize, arguments, program=options.program, seed=options.seed)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
