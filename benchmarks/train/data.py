"""From the settings to a loaded workload."""

from __future__ import annotations

import torch

from benchmarks.errors import UsageError
from benchmarks.train.cifar10 import load_cifar10
from benchmarks.train.config import TrainConfig
from benchmarks.train.glue import load_glue
from benchmarks.train.images import ImageWorkload, load_digits
from benchmarks.train.text import TextWorkload
from benchmarks.train.workload import Workload


def load_workload(config: TrainConfig, device: torch.device) -> Workload:
    """Read the data set, and a pretrained model's folder.

    Raises:
        UsageError: something is missing, or the data set has fewer samples than a batch.
    """
    workload = _load(config, device)
    if workload.train_size < config.batch_size:
        raise UsageError(
            f"--batch-size {config.batch_size}: the training set has only {workload.train_size} "
            "samples"
        )
    return workload


def _load(config: TrainConfig, device: torch.device) -> Workload:
    options = config.train_samples, config.label_noise
    if config.data == "digits":
        return ImageWorkload(load_digits(), config.model, device, *options)
    root = config.data_root
    assert root is not None  # resolve() demands it for every other data set
    if config.data == "cifar10":
        return ImageWorkload(load_cifar10(root), config.model, device, *options)
    train, dev = (load_glue(root, config.data, split) for split in ("train", "dev"))
    return TextWorkload(train, dev, config.model, device, *options)
