"""Where diagnostics go: a writer takes a row of numbers by name."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, float]
Writer = Callable[[Row], None]


class CSVWriter:
    """Appends rows to a CSV file; each is on disk when the call returns.

    An existing file is appended to, so that a resumed run writes to the same one.

    Args:
        path: of the file; its folder must exist.

    Raises:
        ValueError: a row's columns differ from those of the existing file or of the first row.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, row: Row) -> None:
        new = not self.path.exists() or self.path.stat().st_size == 0
        if not new:
            with self.path.open(newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file))
            if columns != list(row):
                raise ValueError(
                    f"row must have the columns of {self.path}, {columns}, got {list(row)}; write "
                    f"to another file"
                )
            self._end_line()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _end_line(self) -> None:
        """End a last row that was cut off, so that the next one is on its own line."""
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\r\n")


class TensorBoardWriter:
    """Writes every number of a row as a scalar ``prefix/name`` at the row's step.

    Args:
        folder: for the event files.
        prefix: of the scalars' names.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, prefix: str = "ksam") -> None:
        try:
            module: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ImportError(
                "TensorBoardWriter needs the package tensorboard (pip install tensorboard)"
            ) from error
        self._writer = module.SummaryWriter(str(folder))
        self._prefix = prefix

    def __call__(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"{self._prefix}/{name}", value, int(row["step"]))
        self._writer.flush()
