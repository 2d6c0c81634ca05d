"""Which steps are sharpness-aware; the others are plain, or along the momentum (``otherwise``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksam.parts import Part
from ksam_kernels.checks import check_count, check_range


@dataclass(frozen=True)
class From:
    """Sharpness-aware steps from step ``start`` (0 is the first) to the end, other steps before.

    SAM in only the last few epochs finds about the same solutions as SAM throughout (Zhou et al.
    2025, "Sharpness-aware minimization efficiently selects flatter minima late in training").
    """

    start: int

    def __post_init__(self) -> None:
        check_count("start", self.start, 0)

    def __call__(self, step: int) -> bool:
        return step >= self.start


@dataclass(frozen=True)
class EveryNth:
    """Every n-th step is sharpness-aware, beginning with the first."""

    n: int

    def __post_init__(self) -> None:
        check_count("n", self.n, 1)

    def __call__(self, step: int) -> bool:
        return step % self.n == 0


class Policy(Part):
    """Decides which steps are sharpness-aware by what earlier steps found out."""

    def decide(self, step: int, cost: float) -> bool:
        """Whether this step is sharpness-aware; changes no state.

        Args:
            step: the number of steps before this one.
            cost: of a sharpness-aware step, in units of a plain one.
        """
        raise NotImplementedError

    def wants_share(self, step: int) -> bool:
        """Whether :meth:`observe` is to get the share of this step's selection."""
        raise NotImplementedError

    def observe(self, step: int, cost: float, share: Tensor | None) -> None:
        """Learn from a completed step.

        Args:
            step: as in :meth:`decide`.
            cost: what this step cost, in units of a plain one.
            share: the share of the batch's gradient bounds that the step's selection carries, or in
                a plain step as many of the highest losses; a float32 scalar on the device.
        """
        raise NotImplementedError


class Representative(Policy):
    r"""Sharpness-aware steps where the selected samples represent the batch.

    The other steps are plain, or along the momentum (``otherwise``).

    The first of every ``every`` steps is a probe. It measures the share
    :math:`\sum_{i \in S} b_i / \sum_i b_i` of the per-sample gradient bounds
    :math:`b_i = \lVert \mathrm{softmax}(x_i) - \mathrm{onehot}(y_i) \rVert_2` (the losses, where
    the loss is not :func:`ksam.cross_entropy`) that the selection S carries; in a plain step S is
    the k highest losses. The share comes from the pass over the whole batch that the step makes
    anyway, as a plain step does too. If it is at least ``threshold``, the *next* ``every`` steps
    are sharpness-aware; so training begins with plain steps. Where a sharpness-aware step does not
    see the whole batch (AUSAM; StaleKSAM except in every ``refresh``-th step), the last probe there
    was decides.

    The share is copied to the host without waiting, and read ``every`` steps later whatever the
    timing, so the decisions are the same on every device and in every run. The state is part of the
    optimizer's ``state_dict``.

    Args:
        threshold: in [0, 1].
        every: steps between probes, >= 1.
        budget: a limit on the mean cost of all steps so far, in units of plain ones: a step that
            would exceed it is not made sharpness-aware. 2 % more are tolerated, as M / 3 is seldom
            a whole number. None: no limit.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    TOLERANCE = 0.02

    def __init__(self, threshold: float = 0.9, every: int = 10, budget: float | None = 1.0) -> None:
        check_range("threshold", threshold, 0.0, 1.0)
        check_count("every", every, 1)
        if budget is not None:
            check_range("budget", budget, 0.0)
        self.threshold, self.every, self.budget = threshold, every, budget
        self.steps, self.spent = 0, 0.0
        self._on = False
        self._probe: _Later | None = None

    def decide(self, step: int, cost: float) -> bool:
        return self._is_on(step) and self._affords(cost)

    def _is_on(self, step: int) -> bool:
        """The last block's probe decides for a block's first step, and the others follow that."""
        if step % self.every != 0:
            return self._on
        return self._probe is not None and self._probe.value() >= self.threshold

    def _affords(self, cost: float) -> bool:
        if self.budget is None:
            return True
        return self.spent + cost <= (1 + self.TOLERANCE) * self.budget * (self.steps + 1)

    def wants_share(self, step: int) -> bool:
        return step % self.every == 0

    def observe(self, step: int, cost: float, share: Tensor | None) -> None:
        self._on = self._is_on(step)
        if share is not None:
            self._probe = _Later(share)
        self.steps += 1
        self.spent += cost

    def state_dict(self) -> dict[str, Any]:
        """Waits for the last probe."""
        probe = None if self._probe is None else self._probe.value()
        return {"on": self._on, "probe": probe, "steps": self.steps, "spent": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._on, self.steps, self.spent = state["on"], state["steps"], state["spent"]
        self._probe = None if state["probe"] is None else _Later(state["probe"])

    def __getstate__(self) -> dict[str, Any]:
        probe = None if self._probe is None else _Later(self._probe.value())
        return {**vars(self), "_probe": probe}


class _Later:
    """A number on its way from the device to the host."""

    def __init__(self, value: Tensor | float) -> None:
        self._event: torch.cuda.Event | None = None
        self._number: Tensor | float
        if isinstance(value, Tensor) and value.is_cuda:
            self._number = torch.empty(
                value.shape, dtype=value.dtype, device="cpu", pin_memory=True
            )
            self._number.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._number = value

    def value(self) -> float:
        """The number; waits for it if it has not arrived, which after some steps it has."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)
