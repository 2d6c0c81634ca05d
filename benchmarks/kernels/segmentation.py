"""Cross-entropy of every pixel: classes in dimension 1, as convolutions put them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ksam_kernels as kk
from benchmarks.kernels.case import FLOAT32, KSAM, Case, compiled, stateless


@dataclass(frozen=True)
class Segmentation:
    """Losses [images, size, size] of logits [images, classes, size, size]."""

    images: int
    classes: int
    size: int

    @property
    def floor_bytes(self) -> int:
        """Logits and int64 classes read once, float32 losses written once."""
        return self.images * self.size**2 * (4 * self.classes + 8 + 4)

    def make_input(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logits and target."""
        shape = (self.images, self.size, self.size)
        logits = torch.randn(self.images, self.classes, self.size, self.size, device=device)
        return logits, torch.randint(self.classes, shape, device=device)

    def ksam(self, logits: Tensor, target: Tensor) -> Tensor:
        """Classes last, as ksam_kernels wants them."""
        return kk.cross_entropy(logits.movedim(1, -1), target)

    def eager(self, logits: Tensor, target: Tensor) -> Tensor:
        """What people write."""
        return F.cross_entropy(logits, target, reduction="none")

    def case(self, device: torch.device, *, quick: bool = False) -> Case:
        """The case with all contestants."""
        return Case(
            room="loss",
            operation="cross_entropy",
            extra="classes in dimension 1",
            shape=f"{self.images}x{self.classes}x{self.size}x{self.size}",
            dtype="float32",
            floor_bytes=self.floor_bytes,
            operators=("cross_entropy",),
            make_input=lambda: self.make_input(device),
            contestants=[
                stateless(KSAM, self.ksam),
                stateless("eager", self.eager, FLOAT32),
                compiled("compile", self.eager, FLOAT32),
            ],
            quick=quick,
        )
