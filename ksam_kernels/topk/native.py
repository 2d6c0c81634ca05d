"""Top-k selection by the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.native import extension, run

if extension is not None:

    @implements("native", "topk_indices", devices=("cpu",))
    def topk_indices(
        losses: Tensor,  # [B]
        k: int,
    ) -> Tensor:
        """Indices [k] int64, ascending, of the k largest losses."""
        losses = losses.contiguous()
        indices = losses.new_empty(k, dtype=torch.int64)  # (k,) takes 1 us longer to parse
        run("topk_indices", losses, indices)
        return indices
