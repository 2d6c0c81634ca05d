"""Batch compaction by the compiled extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ksam_kernels.backends import implements
from ksam_kernels.compact import reference
from ksam_kernels.compact.operators import empty_rows
from ksam_kernels.native import DEVICES, direct, extension


def try_compact_batch(batch: Any, indices: Any) -> Any:
    """The batch's rows, if the kernel takes its tensors as they are.

    Only trees of plain dicts, lists and tuples: walking a tree of four small tensors in Python
    takes longer than gathering its rows.
    """
    kernel = direct("compact")
    return None if kernel is None else kernel(batch, indices, empty_rows)


def register(backend: str, kernels: Any, devices: tuple[str, ...]) -> None:
    """Make the kernels of a compiled module a backend's implementations on some devices."""

    @implements(backend, "compact", devices=devices)
    def compact(
        tensors: list[Tensor],  # each [B, ...]
        indices: Tensor,  # [k]
    ) -> list[Tensor]:
        """Rows ``tensor[indices]`` [k, ...] of every tensor, moved as bytes.

        The kernel takes tensors whose rows are blocks of memory: contiguous, channels-last, slices
        along the batch, prefixes of sequences. What it declines is left to the reference, tensor
        by tensor: rows with gaps or in another order than the result's, dtypes unknown to DLPack,
        on the CPU also indices out of range, which the reference reports. On a GPU the kernel
        asserts that they are in range, and all leaves that it takes at once share one launch.
        """
        gathered: list[Tensor] | None = kernels.compact(tensors, indices, empty_rows)
        if gathered is not None:
            return gathered
        if len(tensors) == 1:
            return reference.compact(tensors, indices)
        return [compact([tensor], indices)[0] for tensor in tensors]


if extension is not None:
    register("native", extension, DEVICES)
