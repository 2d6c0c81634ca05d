"""Selection by a table of what earlier steps found out about a sample, without a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

import ksam_kernels
from ksam.parts import Subset
from ksam.passes import Passes
from ksam.samplers import Some
from ksam.selection import Amount, K, Schedule
from ksam_kernels.checks import (
    INDEX,
    check_count,
    check_dtype,
    check_index_range,
    check_range,
    check_shape,
)

Index = Hashable | Callable[[Any], Tensor]  # a key of the batch, or what finds the indices in it


def sample_rows(batch: Any, index: Index) -> Tensor:
    """The indices of a batch's samples in the data set, int64 ``[B]``."""
    if callable(index):
        rows = index(batch)
    else:
        try:
            rows = batch[index]
        except (KeyError, IndexError, TypeError) as error:
            kind = type(batch).__name__
            raise KeyError(
                f"index must be a key of the batch, a {kind}, or a function that returns its "
                f"samples' indices, got {index!r}"
            ) from error
    check_dtype("the batch's sample index", rows, INDEX)
    if rows.dim() != 1:
        raise ValueError(
            f"the batch's sample index must be one-dimensional, got shape {tuple(rows.shape)}"
        )
    return rows.long()


def check_rows(rows: Tensor, samples: int, size: int) -> None:
    """Check that each sample has one index in [0, size); on a GPU without waiting for the range.

    Raises:
        ValueError, IndexError: another number of them, or one out of range.
    """
    check_shape("the batch's sample index", rows, (samples,), "one entry per sample")
    check_index_range("the batch's sample index", rows, size, "a data set")


class _Table(Some):
    """Figures for every sample of the data set, float32, looked up by the sample's index.

    Args:
        amount: how many samples of a batch are chosen.
        dataset_size: samples in the data set.
        index: the key under which a batch holds its samples' indices, int64 ``[B]``, or a function
            that gets them from the batch.
    """

    #: column name -> initial value
    COLUMNS: dict[str, float]

    def __init__(self, amount: Amount, dataset_size: int, index: Index) -> None:
        check_count("dataset_size", dataset_size, 1)
        super().__init__(amount)
        self.dataset_size, self.index = dataset_size, index
        # Not torch's defaults: losses come as float32, and the table moves to its indices' device.
        self._columns = {
            name: torch.full((dataset_size,), begin, dtype=torch.float32, device="cpu")
            for name, begin in self.COLUMNS.items()
        }

    def check(self, batch: Any, samples: int) -> None:
        check_rows(sample_rows(batch, self.index), samples, self.dataset_size)

    def rows(self, batch: Any) -> Tensor:
        """The indices of the batch's samples, int64 ``[B]``; the table moves to their device."""
        rows = sample_rows(batch, self.index)
        self._columns = {name: c.to(rows.device) for name, c in self._columns.items()}
        return rows

    def column(self, name: str) -> Tensor:
        """A column of the table, float32 ``[dataset_size]``."""
        return self._columns[name]

    def state_dict(self) -> dict[str, Any]:
        return {**self._columns, "amount": super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = [name for name in self.COLUMNS if name not in state]
        if missing:
            raise ValueError(
                f"state_dict must hold {', '.join(self.COLUMNS)} for {type(self).__name__}, got "
                f"{', '.join(map(str, state))}; was it saved by another method?"
            )
        columns = {name: state[name] for name in self.COLUMNS}
        for name, column in columns.items():
            if tuple(column.shape) != (self.dataset_size,):
                raise ValueError(
                    f"{name} in state_dict must have an entry for each of {self.dataset_size} "
                    f"samples (dataset_size), got shape {tuple(column.shape)}"
                )
        self._columns = {name: column.clone() for name, column in columns.items()}
        super().load_state_dict(state["amount"])

    def seen(self, passes: Passes) -> Tensor:
        """The indices of the samples that the step took its ascent gradient on.

        On the device of the table, like all that is written to it: the model, and so the losses and
        what was selected by them, may be on another.
        """
        rows = self.rows(passes.batch)
        chosen = passes.subset.indices
        return rows if chosen is None else rows[chosen.to(rows.device)]


class StaleTopK(_Table):
    """The k samples whose loss was highest when it was last computed (Jiang et al. 2019, stale).

    No selection pass: both gradients cost 6k, as much as SGD at k = M/2. Samples never seen have
    an infinite loss and come first. A sample that is not selected keeps its old loss, so every
    ``refresh``-th step makes the selection pass and notes the loss of every sample of the batch.

    Args:
        k: as in :class:`ksam.samplers.TopK`.
        dataset_size, index: size of the data set, and how to get the indices of a batch's samples.
        refresh: a selection pass is made every ``refresh`` steps; 1 is K-SAM.
    """

    COLUMNS = {"loss": float("inf")}  # noqa: RUF012

    def __init__(self, k: K | Schedule, dataset_size: int, index: Index, refresh: int = 10) -> None:
        super().__init__(Amount(k), dataset_size, index)
        check_count("refresh", refresh, 1)
        self.refresh = refresh

    def sees_batch(self, step: int) -> bool:
        return step % self.refresh == 0

    def _some(self, passes: Passes, size: int) -> Subset:
        if self.sees_batch(passes.step):
            return passes.select(passes.forward_top(size))
        rows = self.rows(passes.batch)  # first: it moves the columns
        stale = self._columns["loss"][rows]
        return passes.select(ksam_kernels.topk_indices(stale, size))

    def observe(self, passes: Passes) -> None:
        rows = self.rows(passes.batch) if passes.knows_the_batch else self.seen(passes)
        losses = passes.losses.to(rows.device, torch.float32)
        self._columns["loss"].index_copy_(0, rows, losses)


class SharpnessSample(_Table):
    r"""AUSAM's samples: drawn by what perturbations did to their loss so far (Deng et al. 2025).

    The score of a sample is the mean of :math:`|L_i(\hat w) - L_i(w)|` over the steps that selected
    it. Within a batch scores are mapped linearly to [``low``, f], normalized to probabilities, and
    :math:`\alpha M` samples are drawn without replacement. f rises from ``low`` to ``high`` over
    the first ``ramp`` epochs; the first epoch takes every sample. An epoch is ``dataset_size`` / M
    steps, rounded up, with the largest M so far, as the last batch may be smaller; on R ranks that
    share the data set, this is R passes over it. Settings and rule are those of the authors' code;
    they give probabilities proportional to the scaled scores within the batch.

    Args:
        alpha: fraction of the batch (float), count (int), or a function of the step.
        dataset_size, index: size of the data set, and how to get the indices of a batch's samples.
        low, high: bounds of the scaled scores, 0 < low <= high <= 1.
        ramp: epochs over which f rises, >= 1.
    """

    COLUMNS = {"total": 0.0, "count": 0.0}  # noqa: RUF012

    def __init__(
        self,
        alpha: K | Schedule,
        dataset_size: int,
        index: Index,
        *,
        low: float = 0.1,
        high: float = 0.5,
        ramp: int = 30,
    ) -> None:
        super().__init__(Amount(alpha, "alpha"), dataset_size, index)
        check_range("high", high, 1e-6, 1.0)
        check_range("low", low, 1e-6, high)
        check_count("ramp", ramp, 1)
        self.low, self.high, self.ramp = low, high, ramp
        self._largest = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._largest = int(state.get("largest", 0))

    def _epoch(self, samples: int, step: int) -> int:
        return step // math.ceil(self.dataset_size / max(self._largest, samples))

    def sees_batch(self, step: int) -> bool:
        return False

    def num_evaluated(self, samples: int, step: int) -> int:
        return samples if self._epoch(samples, step) == 0 else self.amount.of(samples, step)

    def candidates(self, passes: Passes) -> Tensor:
        """As many as are drawn after the first epoch, in which every step takes all samples."""
        return passes.highest(self.amount.of(passes.samples, passes.step))

    def _some(self, passes: Passes, size: int) -> Subset:
        # The top k of log p plus Gumbel noise is a draw without replacement. (A random number of 0
        # comes last: its key is -inf.)
        p = self.probabilities(passes)
        keys = p.log() - (-passes.random().to(p.device).log()).log()
        return passes.select(ksam_kernels.topk_indices(keys, size))

    def probabilities(self, passes: Passes) -> Tensor:
        """Each sample's probability in the first draw, float32 ``[M]``."""
        rows = self.rows(passes.batch)
        score = self._columns["total"][rows] / self._columns["count"][rows].clamp_min(1)
        risen = min(1.0, self._epoch(passes.samples, passes.step) / self.ramp)
        top = self.low + risen * (self.high - self.low)
        spread = (score.max() - score.min()).clamp_min(torch.finfo(score.dtype).tiny)
        scaled = (score - score.min()) / spread * (top - self.low) + self.low
        return scaled / scaled.sum()

    def observe(self, passes: Passes) -> None:
        self._largest = max(self._largest, passes.samples)
        if passes.before is None or passes.after is None:  # a plain step
            return
        rows = self.seen(passes)
        change = (passes.after - passes.before).abs().to(rows.device, torch.float32)
        known = change.isfinite()  # an overflow would be in every mean from then on
        self._columns["total"].index_add_(0, rows, change.where(known, 0.0))
        self._columns["count"].index_add_(0, rows, known.to(change.dtype))
