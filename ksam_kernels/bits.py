"""Tensors as bit patterns, for copies that keep NaN payloads and -0."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """A view as integers of the same width; complex128, wider than any integer, as it is."""
    return tensor.view(_INTEGER.get(tensor.itemsize, tensor.dtype))
