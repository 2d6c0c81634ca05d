"""The numbers that an update reads from device memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DeviceScalars(NamedTuple):
    """The last arguments of ``restore_sgd_`` and ``restore_adam_``, one float32 element each or
    None. Kernels read them when they run, in every replay of a CUDA graph."""

    lr: Tensor | None  # in place of the learning rate that is a number
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def to(self, device: torch.device) -> DeviceScalars:
        """The same on a device."""
        return DeviceScalars(*(None if scalar is None else scalar.to(device) for scalar in self))
