"""Data-parallel training: what the ranks have to agree on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def mean_over_ranks(value: Tensor, model: nn.Module | None) -> Tensor:
    """The mean over the ranks of a DistributedDataParallel model; else the value itself.

    Each rank sees samples of its own. A decision by a number that differs between them would have
    some call the model more often than others, and wait for each other for ever.
    """
    if not isinstance(model, DistributedDataParallel):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total, group=model.process_group)
    return total / torch.distributed.get_world_size(model.process_group)


def without_sync(model: nn.Module | None, accumulates: bool) -> AbstractContextManager[None]:
    """Forward and backward passes within leave a rank's own gradient, if it ``accumulates``.

    The pass after them averages the sum over the ranks, once.
    """
    if accumulates and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
