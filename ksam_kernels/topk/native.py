"""Top-k selection by the compiled extension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.native import DEVICES, direct, extension, run


def try_topk_indices(losses: Tensor, k: int) -> Tensor | None:
    """The indices, if the kernel takes the losses as they are."""
    kernel = direct("topk_indices")
    if kernel is None or not isinstance(losses, Tensor) or type(k) is not int:
        return None
    if losses.is_neg() or not 1 <= k <= losses.numel():  # before there is memory for as many
        return None
    indices = losses.new_empty(k, dtype=torch.int64)
    return indices if kernel(losses, indices) else None


def register(backend: str, kernels: Any, devices: tuple[str, ...]) -> None:
    """Make the kernels of a compiled module a backend's implementations on some devices."""

    @implements(backend, "topk_indices", devices=devices)
    def topk_indices(
        losses: Tensor,  # [B]
        k: int,
    ) -> Tensor:
        """Indices [k] int64, ascending, of the k largest losses."""
        losses = losses.contiguous()
        indices = losses.new_empty(k, dtype=torch.int64)  # (k,) takes 1 us longer to parse
        run(kernels, "topk_indices", losses, indices)
        return indices


if extension is not None:
    register("native", extension, DEVICES)
