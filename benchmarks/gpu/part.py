"""What the parts of the run share: where they run, and the file that each of them leaves."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ksam
import ksam_kernels
from benchmarks.environment import device_name
from ksam_kernels.native import extension

_ROOT = Path(__file__).parent.parent.parent

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


@dataclass(frozen=True)
class Context:
    """Where a part runs. A dry run does all of it on the CPU, with sizes that take no time."""

    device: torch.device
    out: Path
    dry_run: bool
    deadline: float = float("inf")  # of time.monotonic(): what does not begin before is left out
    again: bool = False  # measure everything, whatever an earlier run has left

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def prefix(self) -> str:
        """What file names begin with: figures of a dry run must not look like a GPU's."""
        return "dry-run-" if self.dry_run else ""


_SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


def _hash_of(*paths: Path, facts: str = "") -> str:
    """A hash of files, of the sources in folders, and of facts."""
    digest = hashlib.sha256(facts.encode())
    for path in paths:
        files = [path] if path.is_file() else path.rglob("*")
        for file in sorted(f for f in files if f == path or f.suffix in _SOURCES):
            digest.update(f"{file.relative_to(path.parent)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _code() -> str:
    """A hash of ksam as it would run: its Python files, Triton's kernels among them, what the
    extension is made of, and for what it was built.

    Not of the extension itself: nvcc makes different bytes from the same sources each time.
    """
    names = ("compiler", "cuda_architectures", "sanitized")
    build = "none" if extension is None else repr([getattr(extension, name) for name in names])
    folders = map(Path, (*ksam.__path__, *ksam_kernels.__path__))
    return _hash_of(*folders, _ROOT / "csrc", _ROOT / "setup.py", facts=build)


@functools.cache
def _tests() -> str:
    """A hash of all that decides which tests there are, and which share each is in."""
    shares = (_ROOT / "benchmarks" / "gpu" / name for name in ("tests.py", "share.py"))
    pages = (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md")))  # whose code is tested
    return _hash_of(_ROOT / "tests", *pages, *shares)


def measured(device: torch.device, part: str = "") -> dict[str, str]:
    """What the figures of a part were measured on; figures of anything else are not of this run."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "backend": ksam_kernels.requested_backend(),
        "code": _code(),
        **({"tests": _tests()} if part == "tests" else {}),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file; a reader never sees half of it."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


@dataclass
class PartFile:
    """`<part>.json`: what a part found, on disk as soon as it is known."""

    name: str
    context: Context
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.context.out / f"{self.context.prefix}{self.name}.json"

    @property
    def _measured(self) -> dict[str, str]:
        return measured(self.context.device, self.name)

    def load(self) -> dict[str, Any] | None:
        """What an earlier run left; None if nothing, or nothing of what is measured now."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if self._measured.items() <= content.items() else None

    def unfinished(self) -> dict[str, Any]:
        """The results of an earlier run that was cut off, for this one to go on from."""
        left = None if self.context.again else self.load()
        return {} if left is None or left["complete"] else left["results"]

    def write(self, *, complete: bool) -> None:
        """Replace the file."""
        content = {
            "part": self.name,
            "complete": complete,
            **self._measured,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "results": self.results,
        }
        write_json(self.path, content)

    def fail(self, failure: str) -> None:
        """Write how the part broke off, beside what it or an earlier run has written."""
        left = self.load()
        self.results = {**(self.results if left is None else left["results"]), "failure": failure}
        self.write(complete=False)


# Fills `file.results`, and writes the file as often as there is something to lose.
Run = Callable[[Context, PartFile], None]


def reason(error: BaseException) -> str:
    """The kind and the first line of an error."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
