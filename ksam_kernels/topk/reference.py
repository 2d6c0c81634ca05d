"""Top-k selection in plain PyTorch: the contract that every backend is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ksam_kernels.backends import implements


@implements("reference", "topk_indices")
def topk_indices(
    losses: Tensor,  # [B]
    k: int,
) -> Tensor:
    """Indices [k] int64, ascending, of the k largest losses.

    A stable descending sort is exactly the order wanted: NaN first, -0 equal to +0, equal losses by
    ascending index. GPUs sort by bits, so all NaN are made one positive NaN, and both zeros one.
    """
    if losses.device.type != "cpu":
        losses = losses.masked_fill(losses.isnan(), math.nan).masked_fill(losses == 0, 0.0)
    order = torch.sort(losses, stable=True, descending=True).indices
    return order[:k].sort().values
