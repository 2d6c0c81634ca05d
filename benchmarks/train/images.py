"""Image classification: arrays on the device, augmentation of whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import import_optional
from benchmarks.train.models import build_image_model
from benchmarks.train.workload import INDEX, LABEL, Batch, Workload, subset_rows, with_noise

_TEST_BATCH = 500


@dataclass(frozen=True)
class ImageSplit:
    """Images uint8 [N, H, W, C] and their classes int64 [N]."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> ImageSplit:
        """Return the given rows."""
        return ImageSplit(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> ImageSplit:
        """Return the split on `device`."""
        return ImageSplit(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set as it is read from disk, with the augmentation that suits it."""

    train: ImageSplit
    test: ImageSplit
    shift: int  # random translation of at most this many pixels in each direction
    flip: bool  # random horizontal flip


def load_digits() -> ImageData:
    """Load scikit-learn's 1,797 digits (8 x 8, gray), a fixed stratified quarter for testing."""
    needed_by = "--data digits"
    datasets = import_optional("sklearn.datasets", package="scikit-learn", needed_by=needed_by)
    selection = import_optional(
        "sklearn.model_selection", package="scikit-learn", needed_by=needed_by
    )
    digits = datasets.load_digits()
    # Gray levels are whole numbers from 0 to 16.
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(-1)
    labels = torch.from_numpy(digits.target).long()
    train, test = selection.train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.25, stratify=digits.target, random_state=0
    )
    both = ImageSplit(images, labels)
    return ImageData(
        both.take(torch.from_numpy(train)), both.take(torch.from_numpy(test)), shift=1, flip=False
    )


class ImageWorkload(Workload):
    """Images with a convolutional network; the whole data set lives on the device."""

    def __init__(
        self,
        data: ImageData,
        model: str,
        device: torch.device,
        train_samples: int | None = None,
        label_noise: float = 0.0,
    ) -> None:
        train = data.train
        if train_samples is not None:
            train = train.take(subset_rows(len(train.labels), train_samples))
        classes = int(data.train.labels.max()) + 1
        clean = train.labels
        train = ImageSplit(train.images, with_noise(clean, label_noise, classes))
        self.wrong = (train.labels != clean).nonzero().flatten()
        self.device = device
        self.train_size, self.test_size = len(train.labels), len(data.test.labels)
        self._train, self._test = train.to(device), data.test.to(device)
        self._model = model
        self._classes = classes
        self._shift, self._flip = data.shift, data.flip
        mean, std = channel_statistics(train.images)
        # x -> x * scale + offset is (x - mean) / std
        self._scale = (1 / std).to(device)
        self._offset = (-mean / std).to(device)

    def build_model(self) -> nn.Module:
        channels = self._train.images.shape[-1]
        side = self._train.images.shape[1]
        model = build_image_model(self._model, channels, self._classes, side)
        # The images are stored channels last, and convolutions are faster in that format.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self.device)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch["image"])
        return logits

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        # Drawn on the CPU, so that a seed gives the same batches on every device, and for the
        # whole epoch, so that there are three copies to the device an epoch and none a step.
        size = self.train_size
        order = torch.randperm(size, generator=generator).to(self.device)
        shifts = torch.randint(0, 2 * self._shift + 1, (size, 2), generator=generator)
        flips = torch.rand(size, generator=generator) < (0.5 if self._flip else 0.0)
        shifts, flips = shifts.to(self.device), flips.to(self.device)
        for step in range(self.steps_per_epoch(batch_size)):
            part = slice(step * batch_size, (step + 1) * batch_size)
            rows = order[part]
            images = shift_and_flip(
                self._train.images[rows], shifts[part], flips[part], self._shift
            )
            labels = self._train.labels[rows]
            yield {"image": self._normalize(images), LABEL: labels, INDEX: rows}

    def test_batches(self) -> Iterator[Batch]:
        for start in range(0, self.test_size, _TEST_BATCH):
            part = slice(start, start + _TEST_BATCH)
            yield {
                "image": self._normalize(self._test.images[part]),
                LABEL: self._test.labels[part],
            }

    def _normalize(self, images: Tensor) -> Tensor:
        """Return uint8 [B, H, W, C] as float32 [B, C, H, W], channels last in memory."""
        return torch.addcmul(self._offset, images.float(), self._scale).permute(0, 3, 1, 2)


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor, limit: int) -> Tensor:
    """Translate every image by its own amount, then mirror some.

    Args:
        images: [B, H, W, C].
        shifts: int64 [B, 2], row and column offset of the crop from the image padded with `limit`
            zeros on all sides; `limit` leaves the image where it is.
        flips: bool [B], which crops to mirror left to right.
        limit: the largest translation, in pixels.

    Returns:
        The crops, of the shape of `images`.
    """
    batch, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, limit, limit, limit, limit))
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns) + shifts[:, 1:]
    rows = torch.arange(height, device=device) + shifts[:, :1]
    sample = torch.arange(batch, device=device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 [N, H, W, C], float32 [C]."""
    # From histograms: exact, and without a float copy of the data set.
    levels = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        share = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = (share * levels).sum()
        means.append(mean)
        deviations.append((share * (levels - mean) ** 2).sum().sqrt())
    # A constant channel stays constant instead of dividing by zero.
    std = torch.stack(deviations).clamp_min(1e-6)
    return torch.stack(means).float(), std.float()
