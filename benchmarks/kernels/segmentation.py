"""Cross-entropy of every pixel: classes in dimension 1, as convolutions put them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ksam_kernels as kk
from benchmarks.kernels.case import FLOAT32, KSAM, Case, Tolerance, compiled, stateless
from benchmarks.kernels.cross_entropy import gradient_of, unchanged

# The gradient at a pixel's class is its probability minus 1, often near 0 with few classes. The sum
# of exponentials, 1 and a little, is rounded by up to 2^-24, a probability below 1 by as much: two
# contestants are up to four such roundings apart, however small the gradient is.
_GRADIENT = Tolerance(rtol=1e-4, atol=2**-22)


@dataclass(frozen=True)
class Segmentation:
    """Losses [images, size, size] of logits [images, classes, size, size]."""

    images: int
    classes: int
    size: int
    backward: bool = False

    @property
    def floor_bytes(self) -> int:
        """Logits and int64 classes read once, float32 losses written once.

        The backward pass reads logits, target and upstream gradient, and writes the gradient.
        """
        of_pixel = 4 * self.classes + 8 + 4
        if self.backward:
            of_pixel += 2 * 4 * self.classes + 8 + 4
        return self.images * self.size**2 * of_pixel

    def make_input(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logits and target."""
        shape = (self.images, self.size, self.size)
        logits = torch.randn(self.images, self.classes, self.size, self.size, device=device)
        logits.requires_grad_(self.backward)
        return logits, torch.randint(self.classes, shape, device=device)

    def ksam(self, logits: Tensor, target: Tensor) -> Tensor:
        """Classes last, as ksam_kernels wants them."""
        return kk.cross_entropy(logits.movedim(1, -1), target)

    def eager(self, logits: Tensor, target: Tensor) -> Tensor:
        """What people write."""
        return F.cross_entropy(logits, target, reduction="none")

    def case(self, device: torch.device, *, quick: bool = False) -> Case:
        """The case with all contestants."""
        finish: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
        finish, tolerance = unchanged, FLOAT32
        extra, operators = "classes in dimension 1", ["cross_entropy"]
        if self.backward:
            finish, tolerance = gradient_of, _GRADIENT
            extra += ", forward + backward"
            operators.append("cross_entropy_backward")
        return Case(
            room="loss",
            operation="cross_entropy",
            extra=extra,
            shape=f"{self.images}x{self.classes}x{self.size}x{self.size}",
            dtype="float32",
            floor_bytes=self.floor_bytes,
            operators=tuple(operators),
            make_input=lambda: self.make_input(device),
            contestants=[
                stateless(KSAM, finish(self.ksam)),
                stateless("eager", finish(self.eager), tolerance),
                compiled("compile", self.eager, tolerance, finish),
            ],
            needs_grad=self.backward,
            quick=quick,
        )
