"""What the steps of a run do: counts, averages and a row every so many steps."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ksam_kernels
from ksam import plot
from ksam.base import parameters
from ksam.measures import alignment, check_whole
from ksam.optimizer import SharpnessAware
from ksam.passes import PerSampleLoss
from ksam.result import StepResult
from ksam.tables import Index, check_rows, sample_rows
from ksam.writers import Row, Writer
from ksam_kernels.checks import check_count


class Diagnostics:
    """Keeps counts and averages over the steps of a run, and writes a row every so many steps.

    Call it after every step::

        diagnostics = Diagnostics(optimizer, writers=[CSVWriter("run.csv")])
        result = optimizer.step(loss, batch)
        diagnostics(result, loss, batch)

    A row has the ``step``, ``loss`` and ``grad_norm`` of its own step. Over the steps since the
    last row, it has ``sharp``, the fraction of sharpness-aware steps; ``cost``, the mean cost of a
    step in units of a plain one; and ``share``, the mean share of the batch's gradient bounds that
    the selection carries (see :class:`ksam.Representative`; NaN where no step knows it). Of its own
    batch it has ``alignment`` (:func:`alignment` of as many samples as a sharpness-aware step
    selects; NaN if that is all of them, or if it is turned off). Between rows nothing waits for the
    device. Neither the averages nor the counts of samples are part of a checkpoint: a resumed run
    counts from zero.

    Args:
        optimizer: any of the family. Its steps report their share from now on.
        writers: called with every row.
        every: steps between rows, >= 1.
        measure_alignment: whether rows have ``alignment``, which costs two forward and two backward
            passes over the batch for every row. Not with FSDP2.
        dataset_size: samples in the data set, to count how often each is selected; None: not
            counted.
        index: how to get the indices of a batch's samples: a key of it, or a function.

    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        *,
        writers: Sequence[Writer] = (),
        every: int = 100,
        measure_alignment: bool = True,
        dataset_size: int | None = None,
        index: Index = "index",
    ) -> None:
        if not isinstance(optimizer, SharpnessAware):
            raise TypeError(f"optimizer must be one of ksam's, got {type(optimizer).__name__}")
        check_count("every", every, 1)
        if dataset_size is not None:
            check_count("dataset_size", dataset_size, 1)
        if measure_alignment:
            check_whole("measure_alignment=True", parameters(optimizer.param_groups))
        self._optimizer = optimizer
        self._writers = list(writers)
        self._every = every
        self._measure_alignment = measure_alignment
        self._index = index
        self._dataset_size = dataset_size
        self._counts: Tensor | None = None
        self.rows: list[Row] = []
        optimizer.report_share = True
        self._start()

    def _start(self) -> None:
        self._steps, self._sharp, self._cost = 0, 0, 0.0
        self._shares: list[Tensor] = []

    def __call__(self, result: StepResult, per_sample_loss: PerSampleLoss, batch: Any) -> None:
        """Take in a step, and write a row when one is due.

        Args:
            result: what the step returned.
            per_sample_loss, batch: what the step was given.
        """
        samples = ksam_kernels.batch_size(batch)
        step = self._optimizer.steps_done - 1
        self._steps += 1
        self._sharp += result.sharp
        self._cost += self._optimizer.cost(samples, step) if result.sharp else 1.0
        if result.share is not None:
            self._shares.append(result.share)
        if self._dataset_size is not None:
            self._count(result, batch)
        if self._steps >= self._every:
            try:
                self._write(step, result, per_sample_loss, batch)
            finally:  # a writer that fails loses this row, not those that follow
                self._start()

    def _count(self, result: StepResult, batch: Any) -> None:
        rows = sample_rows(batch, self._index)
        check_rows(rows, ksam_kernels.batch_size(batch), self._dataset_size or 0)
        if self._counts is None:
            self._counts = torch.zeros(
                2, self._dataset_size or 0, dtype=torch.int64, device=rows.device
            )
        seen, selected = self._counts
        seen.index_add_(0, rows, torch.ones_like(rows))
        if result.sharp:
            chosen = rows[result.indices.to(rows.device)]
            selected.index_add_(0, chosen, torch.ones_like(chosen))

    def _write(
        self, step: int, result: StepResult, per_sample_loss: PerSampleLoss, batch: Any
    ) -> None:
        cosine = math.nan
        samples = ksam_kernels.batch_size(batch)
        k = self._optimizer.num_selected(samples, step)
        if self._measure_alignment and k < samples:
            cosine = float(alignment(self._optimizer, per_sample_loss, batch, k))
        row = {
            "step": step,
            "loss": float(result.loss),
            "grad_norm": float(result.grad_norm),
            "sharp": self._sharp / self._steps,
            "cost": self._cost / self._steps,
            "share": float(torch.stack(self._shares).nanmean()) if self._shares else math.nan,
            "alignment": cosine,
        }
        self.rows.append(row)
        for writer in self._writers:
            writer(row)

    @property
    def seen(self) -> Tensor:
        """How often each sample of the data set was in a batch, int64 ``[dataset_size]``."""
        return self._counted()[0]

    @property
    def selected(self) -> Tensor:
        """How often each sample was selected in a sharpness-aware step, int64 ``[dataset_size]``.

        Mislabelled samples stand out: their loss stays high.
        """
        return self._counted()[1]

    def _counted(self) -> tuple[Tensor, Tensor]:
        if self._dataset_size is None:
            raise ValueError("dataset_size must be given to count samples, got None")
        counts = self._counts
        seen, selected = (
            torch.zeros(2, self._dataset_size, dtype=torch.int64) if counts is None else counts
        )
        return seen, selected

    def plot(self, path: str | Path, highlight: Tensor | None = None) -> None:
        """Draw all rows so far, and how often samples were selected, on one page.

        Args:
            path: of the image; its suffix decides the format (``.png``, ``.pdf``, ``.svg``).
            highlight: indices of samples, int64, to set apart from the others: those with known
                wrong labels, say, or of one class.

        Raises:
            ImportError: the package matplotlib is not installed.
        """
        plot.draw(
            path, self.rows, None if self._dataset_size is None else self._counted(), highlight
        )

    def save_counts(self, path: str | Path) -> None:
        """Write a CSV file with the columns index, seen and selected."""
        seen, selected = (count.tolist() for count in self._counted())
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("index", "seen", "selected"))
            writer.writerows(zip(range(len(seen)), seen, selected, strict=True))
