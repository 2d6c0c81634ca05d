"""``torch.ops.ksam`` operator of the compaction room: schema and output shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ksam_kernels.compact.reference import memory_format
from ksam_kernels.library import operator


@operator("(Tensor[] tensors, Tensor indices) -> Tensor[]")
def compact(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    return [
        torch.empty(
            (indices.shape[0], *tensor.shape[1:]),
            dtype=tensor.dtype,
            device=tensor.device,
            memory_format=memory_format(tensor),
        )
        for tensor in tensors
    ]
