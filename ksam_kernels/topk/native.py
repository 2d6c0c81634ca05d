"""Top-k selection by the compiled extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.native import DEVICES, direct, extension, run
from ksam_kernels.topk import reference


def try_topk_indices(losses: Tensor, k: int) -> Tensor | None:
    """The indices, if the kernel takes the losses as they are."""
    kernel = direct("topk_indices")
    return None if kernel is None else kernel(losses, k)


def register(backend: str, kernels: Any, devices: tuple[str, ...]) -> None:
    """Make the kernels of a compiled module a backend's implementations on some devices."""

    @implements(backend, "topk_indices", devices=devices)
    def topk_indices(
        losses: Tensor,  # [B]
        k: int,
    ) -> Tensor:
        """Indices [k] int64, ascending, of the k largest losses."""
        if losses.numel() >= 2**32:  # the kernels count in 32 bits
            return reference.topk_indices(losses, k)
        indices: Tensor = run(kernels, "topk_indices", losses.contiguous(), k)
        return indices


if extension is not None:
    register("native", extension, DEVICES)
