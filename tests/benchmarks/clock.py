"""A clock that stands still while code under test runs, and cases that move it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import KSAM, Case, stateless
from benchmarks.timing import Plan


class Clock:
    """Stands for ``time.perf_counter``; moves when a contestant says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def takes(self, *seconds: float) -> Callable[..., Tensor]:
        """A function that takes these seconds in turn."""
        turns = itertools.cycle(seconds)

        def run(*_: Any) -> Tensor:
            self.now += next(turns)
            return torch.zeros(1)

        return run


def rounds(count: int) -> Plan:
    """A plan of so many rounds, however long they take."""
    return Plan(rounds=count, seconds=0, few_rounds=count, max_seconds=1e9)


def a_case(ours: Callable[..., Any], other: Callable[..., Any]) -> Case:
    """A case of two contestants, whose floor is 1,000 bytes."""
    return Case(
        room="topk",
        operation="topk_indices",
        shape="1",
        dtype="float32",
        floor_bytes=1000,
        operators=("topk_indices",),
        make_input=lambda: (torch.zeros(1),),
        contestants=[stateless(KSAM, ours), stateless("other", other)],
    )
