"""Lists of parameters and gradients of the shapes that kernels trip over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers import FLOATS, sliced, transposed

SHAPES = ((0,), (), (1,), (3, 0, 2), (4095,), (4096,), (4097,), (65535,), (65537,), (256, 256))
SMALL = ((0,), (), (1,), (7, 5), (2, 3, 4, 5), (4097,))


def tensors(
    dtypes: torch.dtype | Sequence[torch.dtype] = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SMALL,
) -> list[Tensor]:
    """Normal values; the dtypes in turn."""
    cycle = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    return [torch.randn(shape).to(cycle[i % len(cycle)]) for i, shape in enumerate(shapes)]


def mixed(shapes: Sequence[tuple[int, ...]] = SMALL) -> list[Tensor]:
    return tensors(FLOATS, shapes)


def like(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Normal values of the parameters' shapes, contiguous."""
    return [torch.randn(p.shape).to(dtype or p.dtype) for p in params]


def empty_like(params: list[Tensor]) -> list[Tensor]:
    """Backups full of NaN, so that what is not written shows."""
    return [torch.full_like(p, float("nan")) for p in params]


def clones(params: list[Tensor]) -> list[Tensor]:
    return [p.clone() for p in params]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, stored otherwise."""
    if layout == "sliced" and tensor.dim() > 0 and tensor.numel() > 0:
        return sliced(tensor)
    if layout == "transposed":
        return transposed(tensor)
    if layout == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.clone()


LAYOUTS = ("contiguous", "sliced", "transposed", "channels last")


def norm64(grads: list[Tensor], params: list[Tensor] | None = None, eta: float = 0.0) -> Tensor:
    """The exact norm but for float64's rounding, scaled so that no square leaves the range."""
    parts = [g.double().flatten() for g in grads]
    if params is not None:
        parts = [(p.double().abs().flatten() + eta) * g for p, g in zip(params, parts, strict=True)]
    whole = torch.cat([torch.zeros(1, dtype=torch.float64), *parts])
    peak = whole.abs().max()
    if peak == 0 or not peak.isfinite():
        return peak
    return peak * (whole / peak).square().sum().sqrt()
