"""CSV files that are complete up to the last row whenever a benchmark is cut off."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

Self = TypeVar("Self", bound="ResultsFile")


class ResultsFile:
    """A CSV file with a header; use it as a context manager.

    Args:
        constant: figures that all rows share.
        kept: rows that it starts with. Until they are written, the file is what it was before.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        constant: dict[str, Any],
        kept: Sequence[dict[str, Any]] = (),
    ) -> None:
        new = path.with_name(f"{path.name}.new")
        self._file = new.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()
        self._constant = constant
        self.append(*kept)
        os.replace(new, path)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows, with the time where they have none; they are on disk when this returns."""
        timestamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        for row in rows:
            self._writer.writerow({**self._constant, "timestamp": timestamp, **row})
        self._file.flush()
