"""Cases of the loss room: per-sample losses, forward as in the selection pass and with gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ksam_kernels as kk
from benchmarks.kernels.case import (
    KSAM,
    Case,
    Contestant,
    Tolerance,
    compiled,
    dtype_name,
    stateless,
)

LEGEND = {
    "eager": "F.cross_entropy or its kin with reduction='none', then mean(1) where the loss is one",
    "eager float": "the same on logits.float(), as autocast does",
    "compile": "torch.compile of that, static shapes; losses in float32 as ksam's",
}

# Sums in another order; losses are up to some 15, most gradients below 1e-3.
_FLOAT32 = Tolerance(rtol=1e-5, atol=1e-5)
_FLOAT32_GRADIENT = Tolerance(rtol=1e-4, atol=1e-8)
# Eager keeps bfloat16 from end to end, eight bits: 0.4 % of a loss, and some per cent of a gradient
# that is the exponential of one.
_BFLOAT16 = Tolerance(rtol=1e-2, atol=1e-2)
_BFLOAT16_GRADIENT = Tolerance(rtol=1e-1, atol=1e-6)

_SMALL = ((128, 10), (128, 100), (32, 1000))
_LARGE = (
    (262144, 10), (65536, 100), (8192, 1000), (1024, 8192), (512, 32000), (128, 128256),
)  # fmt: skip


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
            return losses, torch.topk(losses, self.k).indices
        return losses

    def eager_float(self, logits: Tensor, target: Tensor, weight: Tensor | None) -> Any:
        """What autocast makes of it."""
        return self.eager(logits.float(), target, weight)

    def case(self, device: torch.device, *, quick: bool = False) -> Case:
        """The case with all contestants."""
        finish = _gradient if self.backward else _unchanged
        contestants = [stateless(KSAM, finish(self.ksam))]
        exact, rounded = _FLOAT32, _BFLOAT16
        if self.backward:
            # A gradient is rounded to the dtype of the logits, whoever computes it.
            rounded = _BFLOAT16_GRADIENT
            exact = _FLOAT32_GRADIENT if self.dtype == torch.float32 else rounded
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


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _gradient(losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
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


@dataclass(frozen=True)
class Elementwise:
    """A loss that is the mean over [B, C] elements: binary cross-entropy or squared error."""

    operator: str
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    pos_weight: bool = False

    @property
    def floor_bytes(self) -> int:
        """Prediction and target read once, losses written once."""
        elements = self.rows * self.columns * self.dtype.itemsize
        return 2 * elements + 4 * self.rows + (4 * self.columns if self.pos_weight else 0)

    def make_input(self, device: torch.device) -> tuple[Tensor, ...]:
        """Prediction, target, and the positive weights where there are some."""
        prediction = torch.randn(self.rows, self.columns, device=device).to(self.dtype)
        target = torch.randint(2, (self.rows, self.columns), device=device).to(self.dtype)
        weight = (0.5 + torch.rand(self.columns, device=device),) if self.pos_weight else ()
        return prediction, target, *weight

    def ksam(self, prediction: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
        """What ksam_kernels has for it."""
        if self.operator == "mse":
            return kk.mse(prediction, target)
        return kk.binary_cross_entropy_with_logits(prediction, target, pos_weight=pos_weight)

    def eager(self, prediction: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
        """What people write."""
        if self.operator == "mse":
            return F.mse_loss(prediction, target, reduction="none").mean(1)
        return F.binary_cross_entropy_with_logits(
            prediction, target, reduction="none", pos_weight=pos_weight
        ).mean(1)

    def eager_float(self, prediction: Tensor, target: Tensor, *weight: Tensor) -> Tensor:
        """What autocast makes of it."""
        return self.eager(prediction.float(), target.float(), *weight)

    def case(self, device: torch.device, *, quick: bool = False) -> Case:
        """The case with all contestants."""
        low = self.dtype != torch.float32
        contestants = [
            stateless(KSAM, self.ksam),
            stateless("eager", self.eager, _BFLOAT16 if low else _FLOAT32),
            *([stateless("eager float", self.eager_float, _FLOAT32)] if low else []),
            compiled("compile", self.eager_float, _FLOAT32),
        ]
        return Case(
            room="loss",
            operation=self.operator,
            extra="pos_weight" if self.pos_weight else "",
            shape=f"{self.rows}x{self.columns}",
            dtype=dtype_name(self.dtype),
            floor_bytes=self.floor_bytes,
            operators=(self.operator,),
            make_input=functools.partial(self.make_input, device),
            contestants=contestants,
            quick=quick,
        )


def cases(device: torch.device) -> Iterator[Case]:
    """All cases of the room."""
    bf16 = torch.bfloat16
    for shape in _SMALL:
        yield CrossEntropy(*shape).case(device, quick=True)
    for shape in _LARGE:
        yield CrossEntropy(*shape).case(device)
    for shape in (*_SMALL[-1:], *_LARGE):
        yield CrossEntropy(*shape, bf16).case(device, quick=shape in _SMALL)
    for shape in ((8192, 1000), (512, 32000)):
        yield CrossEntropy(*shape, label_smoothing=0.1).case(device)
        yield CrossEntropy(*shape, bf16, label_smoothing=0.1).case(device)
        yield CrossEntropy(*shape, weighted=True).case(device)
        yield CrossEntropy(*shape, soft=True).case(device)
    for shape in ((128, 10), (128, 1000), (8192, 1000), (512, 32000)):
        quick = shape == (128, 10)
        yield CrossEntropy(*shape, k=shape[0] // 3).case(device, quick=quick)
    for shape in ((128, 1000), (8192, 1000), (512, 32000)):
        yield CrossEntropy(*shape, backward=True).case(device, quick=shape == (128, 1000))
    for shape in ((8192, 1000), (512, 32000)):
        yield CrossEntropy(*shape, bf16, backward=True).case(device)
    bce = "binary_cross_entropy_with_logits"
    for pos_weight in (False, True):
        for shape in ((128, 80), (8192, 1000)):
            elementwise = Elementwise(bce, *shape, pos_weight=pos_weight)
            yield elementwise.case(device, quick=shape == (128, 80))
    yield Elementwise(bce, 8192, 1000, bf16).case(device)
    for shape in ((128, 80), (8192, 1000)):
        yield Elementwise("mse", *shape).case(device, quick=shape == (128, 80))
