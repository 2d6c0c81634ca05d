"""Cross-entropy in all its variants, and who computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ksam_kernels as kk
from benchmarks.kernels.case import (
    BFLOAT16,
    FLOAT32,
    KSAM,
    Case,
    Contestant,
    Tolerance,
    compiled,
    dtype_name,
    stateless,
)

# Most gradients are below 1e-3. Eager's bfloat16 ones are exponentials of log-probabilities with
# eight bits, which are off by some per cent.
FLOAT32_GRADIENT = Tolerance(rtol=1e-4, atol=1e-8)
BFLOAT16_GRADIENT = Tolerance(rtol=1e-1, atol=1e-6)


@dataclass(frozen=True)
class CrossEntropy:
    """A cross-entropy on logits [rows, classes], and what goes with it."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    label_smoothing: float = 0.0
    weighted: bool = False
    soft: bool = False  # probabilities as target
    backward: bool = False
    k: int | None = None  # select the k largest losses

    @property
    def floor_bytes(self) -> int:
        """Logits and target read once, losses written once; int64 classes, float32 losses.

        The backward pass reads logits, target and upstream gradient, and writes the gradient.
        """
        logits = self.rows * self.classes * self.dtype.itemsize
        target = logits if self.soft else 8 * self.rows
        losses = 4 * self.rows
        weight = 4 * self.classes if self.weighted else 0
        floor = logits + target + losses + weight
        if self.backward:
            floor += 2 * logits + target + losses + weight
        return floor + 8 * (self.k or 0)

    @property
    def extra(self) -> str:
        """What sets the case apart from plain cross-entropy, in words."""
        named = {
            "forward + backward": self.backward,
            "soft target": self.soft,
            "smoothing": self.label_smoothing > 0,
            "class weights": self.weighted,
            f"k={self.k}": self.k is not None,
        }
        return ", ".join(name for name, holds in named.items() if holds)

    def make_input(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, target and class weights."""
        logits = torch.randn(self.rows, self.classes, device=device).to(self.dtype)
        logits.requires_grad_(self.backward)
        if self.soft:
            target = torch.rand(self.rows, self.classes, device=device)
            target = (target / target.sum(1, keepdim=True)).to(self.dtype)
        else:
            target = torch.randint(self.classes, (self.rows,), device=device)
        weight = 0.5 + torch.rand(self.classes, device=device) if self.weighted else None
        return logits, target, weight

    def ksam(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Any:
        """What ksam_kernels has for it."""
        if self.k is None:
            return kk.cross_entropy(
                logits, target, weight=weight, label_smoothing=self.label_smoothing
            )
        return kk.select_cross_entropy(
            logits, target, self.k, weight=weight, label_smoothing=self.label_smoothing
        )

    def eager(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Any:
        """What people write, in the dtype of the logits."""
        losses = F.cross_entropy(
            logits, target, weight, reduction="none", label_smoothing=self.label_smoothing
        )
        if self.k is not None:
            return losses, torch.topk(losses, self.k, sorted=False).indices
        return losses

    def eager_float(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Any:
        """What autocast makes of it."""
        return self.eager(logits.float(), target, weight)

    def case(self, device: torch.device, *, quick: bool = False) -> Case:
        """The case with all contestants."""
        finish = gradient_of if self.backward else unchanged
        contestants = [stateless(KSAM, finish(self.ksam))]
        exact, rounded = FLOAT32, BFLOAT16
        if self.backward:
            # A gradient is rounded to the dtype of the logits, whoever computes it.
            rounded = BFLOAT16_GRADIENT
            exact = FLOAT32_GRADIENT if self.dtype == torch.float32 else rounded
        if self.dtype == torch.float32:
            contestants.append(stateless("eager", finish(self.eager), exact))
        else:
            contestants.append(stateless("eager", finish(self.eager), rounded))
            contestants.append(stateless("eager float", finish(self.eager_float), exact))
        contestants.append(compiled("compile", self.eager_float, exact, finish))
        operators = ["select_cross_entropy" if self.k is not None else "cross_entropy"]
        if self.backward:
            operators.append("cross_entropy_backward")
        case = Case(
            room="loss",
            operation=operators[0],
            extra=self.extra,
            shape=f"{self.rows}x{self.classes}",
            dtype=dtype_name(self.dtype),
            floor_bytes=self.floor_bytes,
            operators=tuple(operators),
            make_input=lambda: self.make_input(device),
            contestants=contestants,
            needs_grad=self.backward,
            quick=quick,
        )
        return case if self.k is None else _comparing_selected_losses(case)


def unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward alone."""
    return function


def gradient_of(losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Forward and backward: the gradient of the summed losses with respect to the logits.

    The sum, because the mean of thousands leaves gradients too small to compare.
    """

    def gradient(logits: Tensor, *rest: Any) -> Tensor:
        return torch.autograd.grad(losses(logits, *rest).sum(), logits)[0]

    return gradient


def _comparing_selected_losses(case: Case) -> Case:
    """Compare losses, and the losses selected: where two are close, either index is right."""

    def assert_same(result: Any, expected: Any, contestant: Contestant, _: Any) -> None:
        contestant.tolerance.assert_close(result[0], expected[0])
        chosen = [losses[indices].sort().values for losses, indices in (result, expected)]
        contestant.tolerance.assert_close(*chosen)

    return dataclasses.replace(case, assert_same=assert_same)
