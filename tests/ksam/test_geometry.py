"""Geometries: what they return."""

from __future__ import annotations

import pytest
import torch

from ksam.geometry import Geometry, Moving, StochasticWeights
from tests.helpers import default_dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", [StochasticWeights(1e-9), Geometry()], ids=["none", "all"])
def test_the_norm_is_float32_whatever_the_default_dtype(
    backend: str, geometry: Geometry, dtype: torch.dtype
) -> None:
    """Also where no weight is drawn, and so none is moved."""
    params = [torch.ones(3)]
    moving = Moving(params, [torch.zeros(3)], [torch.empty(3)], [0.1], [])
    with default_dtype(dtype):
        norm = geometry.perturb(moving, {}, "0/0")
    assert norm.dtype == torch.float32
    assert norm.device == params[0].device
    assert float(norm) == 0
