"""Copies of the weights that PyTorch keeps: none may outlive the weights' change."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def drop() -> None:
    """Drop autocast's low-precision copies, and those that ``parametrize.cached()`` keeps.

    Both are kept until the outermost block ends. In a step they would be of other weights, or of a
    pass without gradients, or have a graph that a backward pass has used up.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()
