"""Whether tensors are the same, asked in every step: ``==`` and ``hash`` are slow or no bool."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))
