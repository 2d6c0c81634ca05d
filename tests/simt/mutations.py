"""Are the tests able to fail? ``python -m tests.simt.mutations [--plain] [NAME...]``.

Puts one fault after the other into a copy of the kernels (a barrier left out, a bound off by one, a
counter that is not reset), and runs the contract tests on it, or every kernel once under a
sanitizer: each fault must make them fail. ``--plain`` leaves out those that need a sanitizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.simt import build
from tests.simt.faults import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutations"
COPIED = (
    "csrc",
    "ksam_kernels",
    "python_api",
    "tests",
    "benchmarks",
    "pyproject.toml",
    "README.md",
)
TIMEOUT = 300.0


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{COPY}:{COPY}/python_api"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        check=False,
        cwd=COPY,
        env=environment,
        text=True,
        capture_output=True,
        timeout=TIMEOUT,
    )


def _outcome(mutation: Mutation) -> str | None:
    """How the tests failed; None if they passed."""
    arguments = ["-x", *mutation.tests.split()]
    if mutation.sanitize:
        arguments = ["--program", "--sanitize", mutation.sanitize]
    try:
        done = _python("tests.simt.run", *arguments)
    except subprocess.TimeoutExpired:
        return "endless"
    if "does not compile" in done.stdout + done.stderr or done.returncode in (2, 3, 4, 5):
        raise RuntimeError(f"{mutation.what}: the tests did not run\n{done.stdout}{done.stderr}")
    return None if done.returncode == 0 else f"exit status {done.returncode}"


def _copy() -> None:
    """Copy the tree as it is, and what has been built of it."""
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in COPIED:
        source, target = ROOT / name, COPY / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help='how names, "FILE, FAULT", begin; default: all'
    )
    parser.add_argument("--plain", action="store_true", help="none that needs a sanitizer")
    options = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if (not options.names or mutation.name.startswith(tuple(options.names)))
        and not (options.plain and mutation.sanitize)
    ]
    if not chosen:
        parser.error(f"no fault's name begins with any of {options.names}")
    for sanitize in sorted({mutation.sanitize for mutation in chosen}):
        build.build(sanitize, program=bool(sanitize))
    _copy()
    survived = 0
    for mutation in chosen:
        path = COPY / "csrc" / mutation.file
        original = path.read_text()
        path.write_text(mutation.apply(original))
        try:
            outcome = _outcome(mutation)
        finally:
            path.write_text(original)
        survived += outcome is None
        mode = mutation.sanitize or "plain"
        print(f"{mutation.name} [{mode}]: {outcome or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
