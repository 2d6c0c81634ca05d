"""Losses that are means over the elements of a sample, and who computes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ksam_kernels as kk
from benchmarks.kernels.case import BFLOAT16, FLOAT32, KSAM, Case, compiled, dtype_name, stateless


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
            stateless("eager", self.eager, BFLOAT16 if low else FLOAT32),
            *([stateless("eager float", self.eager_float, FLOAT32)] if low else []),
            compiled("compile", self.eager_float, FLOAT32),
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
