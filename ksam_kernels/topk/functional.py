"""Top-k selection: indices of the k largest losses, the same on every backend."""

from __future__ import annotations

from torch import Tensor

from ksam_kernels import library
from ksam_kernels.checks import FLOATING, check_dtype, check_int
from ksam_kernels.topk import native

__all__ = ["topk_indices"]


def check_k(k: int, batch_size: int) -> None:
    """Raise TypeError or ValueError unless k is an int in [1, B]: an int on the host, so that
    output shapes never wait for the device."""
    check_int("k", k)
    if not 1 <= k <= batch_size:
        raise ValueError(f"k must be in [1, {batch_size}] for {batch_size} losses, got {k}")


def topk_indices(losses: Tensor, k: int) -> Tensor:
    """Indices of the k largest losses, ascending.

    Deterministic and the same on every backend: equal losses go to the lowest index, NaN counts as
    largest, -0 equals +0, and losses are compared exactly in their own dtype. Ascending indices
    make the gather that follows read memory forwards. Floor of bytes moved: each loss once, 8 k.

    Args:
        losses: ``[B]``, float32, bfloat16, float16 or float64.
        k: how many, ``1 <= k <= B``.

    Returns:
        int64 ``[k]``, the set ``torch.sort(losses, stable=True, descending=True).indices[:k]``
        in ascending order.

    Raises:
        TypeError: losses of another dtype, a k that is not an int.
        ValueError: losses that are not one-dimensional, k outside [1, B].
    """
    quick = native.try_topk_indices(losses, k)
    if quick is not None:
        return quick
    check_dtype("losses", losses, FLOATING)
    if losses.dim() != 1:
        raise ValueError(f"losses must be one-dimensional, got shape {tuple(losses.shape)}")
    check_k(k, losses.shape[0])
    indices: Tensor = library.call("topk_indices", losses, k)
    return indices
