"""What the training loop needs to know about a data set and its model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.errors import UsageError

# Every tensor has the batch in dimension 0, so that K-SAM can take rows of it; the class
# indices, int64 [B], are under LABEL.
Batch = dict[str, Tensor]
LABEL = "label"
# The samples' rows in the training set, int64 [B]; test batches have none.
INDEX = "index"

# Seeds the permutation behind --train-samples. It is not a run's seed: every seed trains on the
# same samples.
_SUBSET_SEED = 0


# Seeds the wrong labels: the same for every seed of a run.
_NOISE_SEED = 1


class Workload(ABC):
    """A data set on a device, with the model that is trained on it."""

    device: torch.device
    train_size: int
    test_size: int
    wrong: Tensor  # indices of the training samples whose label is wrong on purpose, int64

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return a new model in train mode; random weights come from torch's global generator."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits, [B, classes]."""

    @abstractmethod
    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield `steps_per_epoch` batches of distinct samples.

        Which samples, in which order, and their augmentation come from `generator` alone.
        """

    @abstractmethod
    def test_batches(self) -> Iterator[Batch]:
        """Yield the test set once, without augmentation."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of training batches.

        All are full: what is left over at the end of an epoch (other samples each time) is left
        out, as statistics of a few samples would disturb BatchNorm's running averages. A training
        set smaller than a batch is one batch.
        """
        return max(1, self.train_size // batch_size)


def subset_rows(size: int, samples: int | None) -> Tensor:
    """Return the rows of a training set to use, int64: all, or `samples` fixed random ones."""
    if samples is None:
        return torch.arange(size)
    if samples > size:
        raise UsageError(f"--train-samples {samples}: the training set has only {size} samples")
    return torch.randperm(size, generator=torch.Generator().manual_seed(_SUBSET_SEED))[:samples]


def with_noise(labels: Tensor, share: float, classes: int) -> Tensor:
    """Return labels, int64 [N], of which round(share * N) are another class, uniformly drawn."""
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shifts = torch.randint(1, classes, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + shifts) % classes
    return noisy
