"""Are the tests able to fail? ``python -m tests.simt.mutations [ROOM...]``.

Puts one fault after the other into a copy of the kernels (a barrier left out, a bound off by one, a
counter that is not reset), and runs the contract tests on it: each fault must make them fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Mutation:
    """One fault: in a file of csrc, `old` (once in the file, or `nth` of several) becomes `new`."""

    what: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments
    sanitize: str = ""
    nth: int = 0

    def apply(self, text: str) -> str:
        parts = text.split(self.old)
        if len(parts) < 2 or self.nth >= len(parts) - 1:
            raise ValueError(f"{self.what}: {self.file} does not hold {self.old!r}")
        before = self.old.join(parts[: self.nth + 1])
        return before + self.new + self.old.join(parts[self.nth + 1 :])


TOPK = "tests/topk"
MUTATIONS = (
    Mutation(
        "no barrier between clearing and counting digits",
        "topk/select.cuh",
        "shared.count[d] = 0;\n  __syncthreads();",
        "shared.count[d] = 0;",
        TOPK,
    ),
    Mutation(
        "no barrier after counting digits",
        "topk/select.cuh",
        "& (kDigits - 1));\n  }\n  __syncthreads();",
        "& (kDigits - 1));\n  }",
        TOPK,
        "thread",
    ),
    Mutation(
        "a plain store where an atomic one is needed",
        "topk/select.cuh",
        "atomicAdd(&count[digit], 1u);",
        "count[digit] += 1u;",
        TOPK,
        "thread",
    ),
    Mutation(
        "ties to the highest index",
        "topk/select.cuh",
        "ahead.equal < at.wanted))",
        "ahead.equal >= at.wanted))",
        TOPK,
    ),
    Mutation(
        "an element too many",
        "topk/select.cuh",
        "const bool real = i < share.end;",
        "const bool real = i <= share.end;",
        TOPK,
        "address,undefined",
    ),
    Mutation(
        "the last element left out",
        "topk/select.cuh",
        "const bool real = i < share.end;",
        "const bool real = i + 1 < share.end;",
        TOPK,
    ),
    Mutation(
        "-0 below +0",
        "topk/topk_key.h",
        "magnitude == 0 ? 0x80000000u : ordered",
        "ordered",
        TOPK,
    ),
    Mutation(
        "no barrier of the grid before global counts are read",
        "topk/topk.cu",
        "grid.sync();\n    for (int d",
        "for (int d",
        TOPK,
    ),
    Mutation(
        "global counts that are not cleared",
        "topk/topk.cu",
        "scratch.count[i] = 0;",
        "(void)i;",
        TOPK,
    ),
    Mutation(
        "a shuffle that a part of the warp leaves out",
        "topk/select.cuh",
        "const uint32_t higher = __shfl_up_sync(kAllLanes, through, by);\n      if",
        "if (lane_of_thread() < by) continue;\n      const uint32_t higher = "
        "__shfl_up_sync(kAllLanes, through, by);\n      if",
        TOPK,
    ),
)


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
    arguments = ["tests.simt.run", "-x", mutation.tests]
    if mutation.sanitize:
        arguments += ["--sanitize", mutation.sanitize]
    try:
        done = _python(*arguments)
    except subprocess.TimeoutExpired:
        return "endless"
    if "does not compile" in done.stdout + done.stderr or done.returncode in (2, 3, 4, 5):
        raise RuntimeError(f"{mutation.what}: the tests did not run\n{done.stdout}{done.stderr}")
    return None if done.returncode == 0 else f"exit status {done.returncode}"


def main() -> int:
    rooms = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not rooms or m.file.split("/")[0] in rooms]
    COPY.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = ROOT / name, COPY / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, target, **({"dirs_exist_ok": True} if source.is_dir() else {}))  # type: ignore[operator]
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
        print(f"{mutation.file}, {mutation.what} [{mode}]: {outcome or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
