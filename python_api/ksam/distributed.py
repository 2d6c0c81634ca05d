"""Data-parallel training: what the ranks have to agree on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ksam_kernels.dtensor import first_dtensor


def _groups(model: nn.Module | None, params: list[Tensor]) -> list[Any]:
    """Process groups over whose ranks the batches of a step are spread, one after the other."""
    if isinstance(model, DistributedDataParallel):
        return [model.process_group]
    sharded = first_dtensor(params)
    if sharded is None:
        return []
    return [sharded.device_mesh.get_group(dim) for dim in range(sharded.device_mesh.ndim)]


def mean_over_ranks(value: Tensor, model: nn.Module | None, params: list[Tensor]) -> Tensor:
    """The mean over the ranks of a DistributedDataParallel model, or of parameters that are
    DTensors; else the value itself.

    Each rank sees samples of its own. A decision by a number that differs between them would have
    some call the model more often than others, and wait for each other for ever.
    """
    for group in _groups(model, params):
        total = value.clone()
        torch.distributed.all_reduce(total, group=group)
        value = total / torch.distributed.get_world_size(group)
    return value


def without_sync(model: nn.Module | None, accumulates: bool) -> AbstractContextManager[None]:
    """Forward and backward passes within leave a rank's own gradient, if it ``accumulates``.

    The pass after them averages the sum over the ranks, once.
    """
    if accumulates and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def gather_anew(model: nn.Module | None, params: list[Tensor]) -> None:
    """FSDP2's modules forget the weights that they have gathered, and gather them in the next pass.

    A forward pass without gradients leaves those of the outermost module where they are, which are
    others than the ranks hold once they have moved.
    """
    if model is None or first_dtensor(params) is None:
        return
    from torch.distributed.fsdp import FSDPModule  # takes a second, which most need not wait for

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
