"""Perturbations whose norm is not that of their own gradients alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]


def with_extra_norm(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Sequence[Tensor],
    rho: Sequence[float],  # one per parameter
    norm: Tensor,
    adaptive: bool,
    eta: float,
) -> Lists:
    """Lists and radii for a ``perturb_`` whose norm also includes the scalar ``norm``, that of T g
    of other tensors. One more parameter, w = 1, brings it in by its gradient and does not move."""
    one = torch.ones_like(norm)
    return (
        [*params, one],
        [*grads, norm / (1 + eta) if adaptive else norm],
        [*backup, torch.empty_like(one)],
        [*rho, 0.0],
    )
