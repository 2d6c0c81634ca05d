"""DTensors, of which a rank holds a part: told from other tensors without importing them.

Their package takes half a second to import; where nobody has imported it there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from torch import Tensor


def first_dtensor(tensors: Collection[Tensor]) -> Any:
    """A ``torch.distributed.tensor.DTensor``, or None where there is none among the tensors."""
    package = sys.modules.get("torch.distributed.tensor")
    # Asked in every step, of all parameters: these are mostly of one or two types.
    if package is None or not any(issubclass(t, package.DTensor) for t in set(map(type, tensors))):
        return None
    return next(tensor for tensor in tensors if isinstance(tensor, package.DTensor))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, the same memory; any other tensor as it is."""
    found = first_dtensor([tensor])
    return tensor if found is None else found.to_local()
