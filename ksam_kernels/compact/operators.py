"""``torch.ops.ksam`` operator of the compaction room: schema and output shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ksam_kernels.compact.reference import memory_format
from ksam_kernels.library import operator


def empty_rows(tensor: Tensor, k: int) -> Tensor:
    """Memory for k rows of ``tensor`` [B, ...]: contiguous, or channels-last where it is."""
    shape = (k, *tensor.shape[1:])
    if tensor.is_contiguous():
        return tensor.new_empty(shape)
    return torch.empty(
        shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor)
    )


@operator("(Tensor[] tensors, Tensor indices) -> Tensor[]")
def compact(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    return [empty_rows(tensor, indices.shape[0]) for tensor in tensors]
