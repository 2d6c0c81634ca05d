"""Steps to look at: K-SAM's operations without a model between them, and KSAM with a small one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ksam_kernels as kk
from benchmarks.kernels.parameters import MODELS, Shape
from benchmarks.kernels.sam import BASES, Ksam, Start
from ksam import KSAM, cross_entropy

Batch = dict[str, Tensor]


def parameter_shapes(*, tiny: bool) -> list[Shape]:
    """ResNet-50's 161 tensors; tiny: three, one of them more than a block of any kernel."""
    return [(3, 5), (7,), (5000,)] if tiny else MODELS["ResNet-50"]()


class Operations:
    """The calls of a step on given logits, batch and gradients, as KSAM makes them.

    Five launches are the least: loss and top-k, compact, norm, perturb, restore and update.
    """

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        samples, classes, side = (16, 10, 4) if tiny else (1024, 1000, 32)
        self.k = samples // 3
        self.logits = torch.randn(samples, classes, device=device)
        self.target = torch.randint(classes, (samples,), device=device)
        image = torch.randn(samples, 3, side, side, device=device)
        self.batch: Batch = {"image": image, "label": self.target}
        start = Start.random(parameter_shapes(tiny=tiny), BASES["SGD"], device)
        self.sam = Ksam(start, BASES["SGD"])
        self.indices = torch.arange(self.k, device=device)
        self.rows: Batch = {}

    def select(self) -> None:
        """Losses and the k largest of them."""
        _, self.indices = kk.select_cross_entropy(self.logits, self.target, self.k)

    def compact(self) -> None:
        """The rows of the selected samples."""
        self.rows = kk.compact_batch(self.batch, self.indices)

    def perturb(self) -> None:
        """Norm and perturbation: two launches."""
        self.sam.perturb()

    def update(self) -> None:
        """Restore and SGD's update."""
        self.sam.update()

    @property
    def calls(self) -> dict[str, Callable[[], None]]:
        """The calls of a step, in order."""
        return {
            "select_cross_entropy": self.select,
            "compact_batch": self.compact,
            "perturb_": self.perturb,
            "restore_sgd_": self.update,
        }

    def schedule(self) -> None:
        """Nothing changes from step to step."""

    def step(self) -> None:
        """All of them."""
        for call in self.calls.values():
            call()

    @property
    def state(self) -> list[Tensor]:
        """Everything that a step leaves."""
        sam = self.sam
        written = [*sam.params, *sam.kept, *sam.state["momentum_buffer"]]
        return [*written, self.indices, *self.rows.values()]


class Training:
    """KSAM training a small network with BatchNorm on one batch."""

    def __init__(self, device: torch.device, base: type[torch.optim.Optimizer], **kw: Any) -> None:
        torch.manual_seed(1)
        layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)]
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = KSAM(self.model.parameters(), base, rho=0.05, model=self.model, **kw)
        x, y = torch.randn(96, 32), torch.randint(10, (96,))
        self.batch: Batch = {"x": x.to(device), "y": y.to(device)}

    def _losses(self, batch: Batch) -> Tensor:
        return cross_entropy(self.model(batch["x"]), batch["y"])

    def schedule(self) -> None:
        """Lower the learning rate as torch's schedulers do: in its memory, where it is a tensor."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.9 * group["lr"])

    def step(self) -> None:
        """One step, nothing of which is read."""
        self.optimizer.step(self._losses, self.batch)

    @property
    def state(self) -> list[Tensor]:
        """Weights, BatchNorm's statistics and the base's state."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        for entry in self.optimizer.state.values():
            kept += [value for value in entry.values() if isinstance(value, Tensor)]
        return kept


def subjects(
    device: torch.device, *, tiny: bool
) -> dict[str, Callable[[], Operations] | Callable[[], Training]]:
    """The operations alone, and KSAM over the base optimizers that have fused updates: SGD with a
    learning rate that is a number, AdamW with one in the device's memory."""
    rate = partial(torch.tensor, 1e-3, device=device)
    return {
        "operations": lambda: Operations(device, tiny=tiny),
        "KSAM over SGD": lambda: Training(device, torch.optim.SGD, lr=0.1, momentum=0.9),
        "KSAM over AdamW": lambda: Training(device, torch.optim.AdamW, lr=rate()),
    }


SUBJECTS = tuple(subjects(torch.device("cpu"), tiny=True))
