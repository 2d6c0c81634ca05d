"""The compared methods: the base optimizer alone, SAM, and K-SAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train.config import TrainConfig, format_k
from benchmarks.train.workload import LABEL, Batch, Workload
from ksam import KSAM, cross_entropy
from ksam.selection import subset_size

BASE_LABELS = {"sgd": "SGD", "adamw": "AdamW"}

# Takes one optimization step on a batch; returns the mean loss over the batch before the step,
# a scalar on the device.
Step = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to train: `k` is K-SAM's, 1.0 for SAM and None for the base optimizer alone."""

    name: str
    label: str
    k: float | int | None

    def theoretical_cost(self, batch_size: int) -> float:
        """Return the cost of a step in units of the base optimizer's, 3M.

        A sample's forward pass costs 1 and its backward pass 2. Both gradients on k of M samples
        cost 6k; choosing them costs a forward pass of all M, which SAM does not need.
        """
        if self.k is None:
            return 1.0
        kept = subset_size(self.k, batch_size)
        selection = batch_size if kept < batch_size else 0
        return (selection + 6 * kept) / (3 * batch_size)


def make_method(name: str, config: TrainConfig) -> Method:
    """Return the method called `name` on the command line."""
    if name == "sgd":
        return Method(name, BASE_LABELS[config.base], k=None)
    if name == "sam":
        return Method(name, "SAM", k=1.0)
    return Method(name, f"K-SAM, k={format_k(config.k)}", k=config.k)


def make_step(
    method: Method, workload: Workload, model: nn.Module, config: TrainConfig
) -> tuple[torch.optim.Optimizer, Step]:
    """Return the method's optimizer for `model` and the function that takes a step with it."""
    groups = parameter_groups(model, config.weight_decay)
    base, options = _base_optimizer(config)
    if method.k is None:
        optimizer = base(groups, **options)
        return optimizer, _plain_step(optimizer, workload, model, config.label_smoothing)
    ksam = KSAM(groups, base, rho=config.rho, k=method.k, model=model, **options)
    return ksam, _ksam_step(ksam, workload, model, config.label_smoothing)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters so that biases and normalization scales do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _base_optimizer(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if config.base == "sgd":
        return torch.optim.SGD, {"lr": config.lr, "momentum": 0.9}
    return torch.optim.AdamW, {"lr": config.lr}


def _plain_step(
    optimizer: torch.optim.Optimizer, workload: Workload, model: nn.Module, smoothing: float
) -> Step:
    """The loop anyone would write, and none of ksam's code: the yardstick for the others."""

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        logits = workload.forward(model, batch)
        loss = F.cross_entropy(logits, batch[LABEL], label_smoothing=smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _ksam_step(optimizer: KSAM, workload: Workload, model: nn.Module, smoothing: float) -> Step:
    def per_sample_loss(batch: Batch) -> Tensor:
        logits = workload.forward(model, batch)
        return cross_entropy(logits, batch[LABEL], label_smoothing=smoothing)

    def step(batch: Batch) -> Tensor:
        return optimizer.step(per_sample_loss, batch).loss

    return step
