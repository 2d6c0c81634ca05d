"""Progress of all runs: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from benchmarks.errors import import_optional
from benchmarks.train.loop import EpochResult


class Progress:
    """One bar over the training steps of all runs; use it as a context manager.

    Args:
        steps: training steps of all runs together.
    """

    def __init__(self, steps: int) -> None:
        tqdm = import_optional("tqdm", package="tqdm", needed_by="the progress bar")
        self._epochs = 0
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=steps, unit="step", dynamic_ncols=True, disable=not self._is_terminal
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def start(self, method: str, seed: int, epochs: int) -> None:
        """Announce a run of so many epochs."""
        self._epochs = epochs
        self._bar.set_postfix_str(f"{method} seed {seed}")

    def step(self) -> None:
        """Count one training step."""
        self._bar.update()

    def epoch(self, result: EpochResult) -> None:
        """Show where a run stands after an epoch."""
        text = (
            f"{result.method} seed {result.seed} epoch {result.epoch}/{self._epochs} "
            f"accuracy {100 * result.test_accuracy:.2f} %"
        )
        if self._is_terminal:
            self._bar.set_postfix_str(text)
        else:
            print(f"{text}  loss {result.train_loss:.4f}  {result.train_seconds:.1f} s", flush=True)
