"""DTensors, of which a rank holds a part: told from other tensors without importing them.

Their package takes half a second to import; where nobody has imported it there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def first_dtensor(tensors: Iterable[Tensor]) -> Any:
    """A ``torch.distributed.tensor.DTensor``, or None where there is none among the tensors."""
    package = sys.modules.get("torch.distributed.tensor")
    if package is None:
        return None
    return next((tensor for tensor in tensors if isinstance(tensor, package.DTensor)), None)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, the same memory; any other tensor as it is."""
    found = first_dtensor([tensor])
    return tensor if found is None else found.to_local()
