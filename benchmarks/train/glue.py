"""GLUE classification tasks from their tsv files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import UsageError


@dataclass(frozen=True)
class GlueTask:
    """Where a task's files are and what their columns hold."""

    folder: str
    sentences: tuple[int, ...]  # columns of the one or two sentences
    label: int  # column
    classes: Mapping[str, int]


_BINARY = {"0": 0, "1": 1}

TASKS = {
    "sst2": GlueTask("SST-2", sentences=(0,), label=1, classes=_BINARY),
    "rte": GlueTask("RTE", (1, 2), label=3, classes={"entailment": 0, "not_entailment": 1}),
    "mrpc": GlueTask("MRPC", (3, 4), label=0, classes=_BINARY),
}


@dataclass(frozen=True)
class GlueSplit:
    """The sentences, N each, column by column (one or two columns), and N class indices."""

    sentences: tuple[list[str], ...]
    labels: list[int]

    def take(self, rows: list[int]) -> GlueSplit:
        """Return the given rows."""
        columns = tuple([column[row] for row in rows] for column in self.sentences)
        return GlueSplit(columns, [self.labels[row] for row in rows])


def load_glue(root: Path, name: str, split: str) -> GlueSplit:
    """Read a split of a task, e.g. `load_glue(root, "rte", "dev")` for root/RTE/dev.tsv."""
    task = TASKS[name]
    path = root / task.folder / f"{split}.tsv"
    try:
        # Not the csv module: quote characters are plain text in these files. Lines end at "\n"
        # alone, and some files begin with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"--data-root {root}: {path} is missing") from None
    rows = []
    labels = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        try:
            labels.append(task.classes[fields[task.label]])
            rows.append(tuple(fields[column] for column in task.sentences))
        except (IndexError, KeyError):
            raise UsageError(f"--data-root: {path}:{number} is not a row of {name}") from None
    if not rows:
        raise UsageError(f"--data-root: {path} has no rows")
    return GlueSplit(tuple(list(column) for column in zip(*rows, strict=True)), labels)
