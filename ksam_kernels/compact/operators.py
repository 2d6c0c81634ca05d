"""``torch.ops.ksam`` operator of the compaction room: schema and output shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ksam_kernels.compact.reference import memory_format
from ksam_kernels.library import operator


def empty_rows(tensor: Tensor, k: int) -> Tensor:
    """Memory for k rows of ``tensor`` [B, ...]: contiguous, or channels-last where it is."""
    if tensor.is_contiguous():
        return tensor.new_empty(k, *tensor.shape[1:])  # a tuple takes torch 1 us longer to parse
    return torch.empty(
        (k, *tensor.shape[1:]),
        dtype=tensor.dtype,
        device=tensor.device,
        memory_format=memory_format(tensor),
    )


@operator("(Tensor[] tensors, Tensor indices) -> Tensor[]")
def compact(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    return [empty_rows(tensor, indices.shape[0]) for tensor in tensors]
