"""Batch compaction in plain PyTorch: the contract that every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.bits import as_bits
from ksam_kernels.checks import check_index_range


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format that the gathered rows keep: channels-last where the tensor has it."""
    if not tensor.is_contiguous():
        for dims, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensor.dim() == dims and tensor.is_contiguous(memory_format=fmt):
                return fmt
    return torch.contiguous_format


@implements("reference", "compact")
def compact(
    tensors: list[Tensor],  # each [B, ...]
    indices: Tensor,  # [k]
) -> list[Tensor]:
    """Rows ``tensor[indices]`` [k, ...] of every tensor, moved as bits."""
    if tensors:
        check_index_range("indices", indices, tensors[0].shape[0], "a batch")
    gathered = []
    for tensor in tensors:
        source = tensor.resolve_conj().resolve_neg()
        rows = as_bits(source).index_select(0, indices).view(source.dtype)
        gathered.append(rows.contiguous(memory_format=memory_format(tensor)))
    return gathered
