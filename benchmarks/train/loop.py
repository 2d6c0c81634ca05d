"""One training run: a method, a seed, all epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.environment import synchronize
from benchmarks.train.config import TrainConfig
from benchmarks.train.methods import Method
from benchmarks.train.steps import make_step
from benchmarks.train.workload import LABEL, Workload

_WARMUP_SHARE = 0.05  # of all steps


@dataclass(frozen=True)
class EpochResult:
    """A run's state after an epoch."""

    method: str
    seed: int
    epoch: int  # from 1
    train_seconds: float  # since the start of the run; loading and evaluation do not count
    train_loss: float  # mean over the epoch's steps, each before its update
    test_accuracy: float  # share of the test set, 0 to 1
    gradient_cost: float = 1.0  # mean of the steps so far by count, in units of the base's

    @property
    def finite(self) -> bool:
        """Whether every loss of the epoch was finite."""
        return math.isfinite(self.train_loss)


def train(
    workload: Workload,
    method: Method,
    config: TrainConfig,
    seed: int,
    on_step: Callable[[], None],
) -> Iterator[EpochResult]:
    """Train a new model and yield a result after every epoch.

    The seed alone decides initial weights, order of samples and augmentation: they are the same
    for every method. Dropout starts from the same state too, but K-SAM's three passes draw more
    from it than SGD's one.
    """
    model = seeded_model(workload, seed)
    optimizer, step = make_step(method, workload, model, config, seed)
    steps = workload.steps_per_epoch(config.batch_size)
    if config.diagnostics and seed == 0:
        step.watch(config.out / f"diagnostics-{method.name}", steps * method.epochs)
    scheduler = warmup_cosine(optimizer, steps * method.epochs)
    generator = data_generator(seed)
    seconds = 0.0
    for epoch in range(1, method.epochs + 1):
        loss_sum = torch.zeros((), device=workload.device)
        synchronize(workload.device)
        start = time.perf_counter()
        for batch in workload.train_batches(config.batch_size, generator):
            loss_sum += step(batch)
            scheduler.step()
            on_step()
        synchronize(workload.device)
        seconds += time.perf_counter() - start
        step.end_epoch()
        yield EpochResult(
            method=method.name,
            seed=seed,
            epoch=epoch,
            train_seconds=seconds,
            train_loss=loss_sum.item() / steps,
            test_accuracy=evaluate(workload, model),
            gradient_cost=step.spent / (steps * epoch),
        )


def seeded_model(workload: Workload, seed: int) -> nn.Module:
    """Return a new model; its weights, and dropout from here on, depend on `seed` alone."""
    torch.manual_seed(seed)
    model = workload.build_model()
    # Loading a pretrained model may or may not draw random numbers; dropout should not notice.
    torch.manual_seed(seed)
    return model


def data_generator(seed: int) -> torch.Generator:
    """Return the generator (CPU) behind a run's order of samples and augmentation."""
    return torch.Generator().manual_seed(seed)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Schedule the learning rate: linear over the first 5 % of `steps`, then a cosine to 0."""
    warmup = max(1, round(_WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def evaluate(workload: Workload, model: nn.Module) -> float:
    """Return the accuracy on the test set, 0 to 1; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=workload.device)
    with torch.inference_mode():
        for batch in workload.test_batches():
            predicted = workload.forward(model, batch).argmax(1)
            correct += (predicted == batch[LABEL]).sum()
    model.train(was_training)
    return correct.item() / workload.test_size
