"""What the parts of the run share: where they run, and the file that each of them leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import device_name


@dataclass(frozen=True)
class Context:
    """Where a part runs. A dry run does all the same on the CPU, with sizes that take no time."""

    device: torch.device
    out: Path
    dry_run: bool
    deadline: float = float("inf")  # of time.monotonic(): what does not begin before is left out

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def prefix(self) -> str:
        """Before file names: figures of a dry run must not look like a GPU's."""
        return "dry-run-" if self.dry_run else ""


@dataclass
class PartFile:
    """`<part>.json`: what a part found, on disk as soon as it is known."""

    name: str
    context: Context
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.context.out / f"{self.context.prefix}{self.name}.json"

    def load(self) -> dict[str, Any] | None:
        """What an earlier run left; None if it left nothing."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def write(self, *, complete: bool) -> None:
        """Replace the file; a reader never sees half of it."""
        content = {
            "part": self.name,
            "complete": complete,
            "device": device_name(self.context.device),
            "torch": torch.__version__,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "results": self.results,
        }
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


# Fills `file.results`, and writes the file as often as there is something to lose.
Run = Callable[[Context, PartFile], None]


def reason(error: BaseException) -> str:
    """The kind and the first line of an error."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
