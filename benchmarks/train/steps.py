"""Steps on a batch: of the base optimizer alone, and of a sharpness-aware method over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ksam
from benchmarks.train.config import BASES, TrainConfig
from benchmarks.train.methods import SPECS, Method, Run
from benchmarks.train.workload import INDEX, LABEL, Batch, Workload
from ksam import SharpnessAware, cross_entropy

_ROWS = 100  # of diagnostics in a training


class Step:
    """Takes one optimization step on a batch; returns the mean loss, a scalar on the device.

    The loss is that over the batch before the step, where the method evaluates it.
    """

    spent = 0.0  # cost of the steps so far, in units of the base optimizer's

    def __call__(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def end_epoch(self) -> None:
        """Tell the optimizer what it wants to know once an epoch."""

    def watch(self, path: Path, steps: int) -> None:
        """Write diagnostics of a training of `steps` to `path`.csv and .png, if there are any.

        They take two more gradients a hundred times, which counts as training time.
        """


def make_step(
    method: Method, workload: Workload, model: nn.Module, config: TrainConfig, seed: int = 0
) -> tuple[torch.optim.Optimizer, Step]:
    """Return the method's optimizer for `model` and the function that takes a step with it."""
    groups = parameter_groups(model, config.weight_decay)
    base, options = _base_optimizer(config)
    if method.is_base:
        optimizer = base(groups, **options)
        return optimizer, _PlainStep(optimizer, workload, model, config.label_smoothing)
    steps = workload.steps_per_epoch(config.batch_size) * method.epochs
    options |= {"model": model, "seed": seed}
    run = Run(config, groups, base, options, workload.train_size, steps)
    sharp = SPECS[method.name].build(run)
    return sharp, _SharpStep(sharp, workload, model, config.label_smoothing)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters so that biases and normalization scales do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _base_optimizer(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    options = {"lr": config.lr}
    if config.base == "sgd":
        options["momentum"] = 0.9
    return BASES[config.base], options


class _PlainStep(Step):
    """The loop anyone would write, and none of ksam's code: the yardstick for the others."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        workload: Workload,
        model: nn.Module,
        smoothing: float,
    ) -> None:
        self._optimizer, self._workload, self._model = optimizer, workload, model
        self._smoothing = smoothing

    def __call__(self, batch: Batch) -> Tensor:
        self._optimizer.zero_grad()
        logits = self._workload.forward(self._model, batch)
        loss = F.cross_entropy(logits, batch[LABEL], label_smoothing=self._smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.spent += 1.0
        return loss.detach()


class _SharpStep(Step):
    def __init__(
        self, optimizer: SharpnessAware, workload: Workload, model: nn.Module, smoothing: float
    ) -> None:
        self._optimizer, self._workload, self._model = optimizer, workload, model
        self._smoothing = smoothing
        self._correct: Tensor | None = None
        self._samples = 0
        q = optimizer.q if isinstance(optimizer, ksam.OrderedSGD) else None
        self._schedule = q if isinstance(q, ksam.AccuracySchedule) else None
        self._diagnostics: ksam.Diagnostics | None = None
        self._page = Path()

    def watch(self, path: Path, steps: int) -> None:
        self._page = path.with_suffix(".png")
        rows = path.with_suffix(".csv")
        rows.unlink(missing_ok=True)
        self._diagnostics = ksam.Diagnostics(
            self._optimizer,
            writers=[ksam.CSVWriter(rows)],
            every=max(1, steps // _ROWS),
            dataset_size=self._workload.train_size,
            index=INDEX,
        )

    def _losses(self, batch: Batch) -> Any:
        logits = self._workload.forward(self._model, batch)
        losses = cross_entropy(logits, batch[LABEL], label_smoothing=self._smoothing)
        if self._schedule is None:
            return losses
        return losses, (logits.detach().argmax(1) == batch[LABEL]).sum()

    def __call__(self, batch: Batch) -> Tensor:
        samples = len(batch[LABEL])
        cost = self._optimizer.cost(samples)
        result = self._optimizer.step(self._losses, batch)
        self.spent += cost if result.sharp else 1.0
        if self._diagnostics is not None:
            self._diagnostics(result, self._losses, batch)
        if self._schedule is not None:
            self._samples += samples
            self._correct = result.aux if self._correct is None else self._correct + result.aux
        return result.loss

    def end_epoch(self) -> None:
        """Draw the page of diagnostics anew; let Ordered SGD's q follow the training accuracy."""
        if self._diagnostics is not None:
            self._diagnostics.plot(self._page, self._workload.wrong)
        if self._schedule is not None and self._correct is not None:
            self._schedule.accuracy = self._correct.item() / self._samples
            self._correct, self._samples = None, 0
