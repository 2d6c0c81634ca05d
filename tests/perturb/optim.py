"""``torch.optim`` as the oracle of the fused updates, and what the tests of both share.

The oracle runs ``foreach=False``, in float64: ``fused=True`` is wrong for bfloat16 on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers import arithmetic_unit, assert_within, smallest, unit

SHAPES = ((7, 5), (), (0,), (4097,))
INF, NAN = float("inf"), float("nan")


class Oracle:
    """A torch optimizer over copies of the parameters, in a dtype of its own."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        params: list[Tensor],
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        self.params = [p.detach().to(dtype, copy=True).requires_grad_() for p in params]
        self.optimizer = kind(self.params, foreach=False, **options)  # type: ignore[call-arg]

    def step(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.to(p.dtype)
        self.optimizer.step()

    def state(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[p][name] for p in self.params]

    def set_state(self, **lists: list[Tensor]) -> None:
        for name, values in lists.items():
            for p, value in zip(self.params, values, strict=True):
                kept = value.float() if name == "step" else value.to(p.dtype)
                self.optimizer.state[p][name] = kept.clone()


def zeros_like(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in params]


def counters(params: list[Tensor], value: float = 0.0) -> list[Tensor]:
    return [torch.full((), value) for _ in params]


def one(value: float) -> Tensor:
    return torch.full((1,), value)


def garbage(params: list[Tensor]) -> list[Tensor]:
    """Parameters as a perturbation left them: nothing that restore may read."""
    return [torch.full_like(p, NAN) for p in params]


def name(options: dict[str, Any]) -> str:
    """A test id from the options that are not zero or False."""
    return " ".join(f"{key}={value}" for key, value in options.items() if value) or "plain"


def assert_close(
    actual: list[Tensor], expected: list[Tensor], roundings: float, scale: float
) -> None:
    """``roundings`` of the arithmetic on numbers up to ``scale``, and one to the stored dtype."""
    for a, e in zip(actual, expected, strict=True):
        bound = roundings * arithmetic_unit(a.dtype) * scale + unit(a.dtype) * e.detach().abs()
        assert_within(a, e, bound + smallest(a.dtype))
