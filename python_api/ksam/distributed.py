"""Data-parallel training: what the ranks have to agree on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ksam import interrupts
from ksam_kernels.dtensor import first_dtensor

M = TypeVar("M", bound=nn.Module)


def _imported(module: str, name: str) -> Any:
    """A class whose module takes a second to import; None if nobody did: it has no instances."""
    return getattr(sys.modules.get(module), name, None)


def _all(model: nn.Module | None, kind: type[M]) -> list[M]:
    """The modules of that kind that a model is or has, behind ``torch.compile``, say."""
    modules = () if model is None else model.modules()
    return [module for module in modules if isinstance(module, kind)]


def data_parallel(model: nn.Module | None) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules that a model is or has."""
    return _all(model, DistributedDataParallel)


def has_fully_sharded(model: nn.Module | None) -> bool:
    """Whether a model is or has a FullyShardedDataParallel (FSDP1)."""
    kind = _imported("torch.distributed.fsdp", "FullyShardedDataParallel")
    return kind is not None and bool(_all(model, kind))


def is_zero(base: Optimizer) -> bool:
    """Whether every rank keeps a part of the optimizer's state, as ZeroRedundancyOptimizer does."""
    kind = _imported("torch.distributed.optim", "ZeroRedundancyOptimizer")
    return kind is not None and isinstance(base, kind)


def _groups(model: nn.Module | None, params: list[Tensor]) -> list[Any]:
    """Process groups over whose ranks the batches of a step are spread, one after the other."""
    groups = [wrapped.process_group for wrapped in data_parallel(model)]
    sharded = first_dtensor(params)
    if not groups and sharded is not None:
        groups = [sharded.device_mesh.get_group(dim) for dim in range(sharded.device_mesh.ndim)]
    return list(dict.fromkeys(groups))


def has_ranks() -> bool:
    """Whether this process is one of several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def mean_over_ranks(value: Tensor, model: nn.Module | None, params: list[Tensor]) -> Tensor:
    """The mean over the ranks of a DistributedDataParallel model, or of parameters that are
    DTensors; else the value itself.

    Each rank sees its own samples. If ranks decided by a number that differs between them, some
    would call the model more often than others, and they would wait for each other forever.
    """
    for group in _groups(model, params):
        total = value.clone()
        torch.distributed.all_reduce(total, group=group)
        value = total / torch.distributed.get_world_size(group)
    return value


@contextmanager
def without_sync(wrapped: list[DistributedDataParallel]) -> Iterator[None]:
    """Forward and backward passes within leave a rank's own gradient.

    The pass after them averages the sum over the ranks, once.
    """
    with ExitStack() as stack:
        for each in wrapped:
            stack.enter_context(each.no_sync())
        yield


def sync_buffers(wrapped: list[DistributedDataParallel]) -> None:
    """Buffers become rank 0's, where a forward pass would make them so."""
    for each in wrapped:
        if each._check_sync_bufs_pre_fwd():  # type: ignore[no-untyped-call]
            each._sync_buffers()  # type: ignore[no-untyped-call]


@contextmanager
def own_buffers(wrapped: list[DistributedDataParallel]) -> Iterator[None]:
    """Forward passes within leave a rank's buffers as they are: none come from rank 0."""
    broadcasting = [each for each in wrapped if each.broadcast_buffers]
    if not broadcasting:
        yield
        return

    def put_back() -> None:
        for each in broadcasting:
            each.broadcast_buffers = True

    with interrupts.undone(put_back):
        for each in broadcasting:
            each.broadcast_buffers = False
        yield


@contextmanager
def apart(model: nn.Module | None) -> Iterator[None]:
    """Passes within are a rank's own, and nothing of them is left in DistributedDataParallel.

    Not all ranks need to make them: no gradient is averaged, and no buffers come from rank 0, now
    or later because of a pass here.
    """
    wrapped = data_parallel(model)
    if not wrapped:
        yield
        return
    before = [each.require_forward_param_sync for each in wrapped]

    def put_back() -> None:
        for each, was in zip(wrapped, before, strict=True):
            each.require_forward_param_sync = was

    with interrupts.undone(put_back), without_sync(wrapped):
        for each in wrapped:
            each.require_forward_param_sync = False  # of buffers; within no_sync() it stays so
        yield


@contextmanager
def averaged(model: nn.Module | None, params: list[Tensor], accumulates: bool) -> Iterator[None]:
    """A pass whose gradient is averaged over the ranks, while that of passes before is put aside.

    DistributedDataParallel averages by itself, except with ``find_unused_parameters``: parameters
    used in earlier, unsynchronized passes are reduced only in the next synchronized one, when their
    gradient has been set aside. So the average is taken here.
    """
    wrapped = [
        each
        for each in (data_parallel(model) if accumulates else [])
        # Not in the user's no_sync().
        if each.find_unused_parameters and each.require_backward_grad_sync
    ]
    if not wrapped:
        yield
        return
    with without_sync(wrapped):
        yield
    held = set(map(id, params))
    for each in wrapped:
        for p in each.parameters():
            if p.requires_grad and id(p) in held:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad, group=each.process_group)
                p.grad /= torch.distributed.get_world_size(each.process_group)


def _sharded_modules(model: nn.Module | None, params: list[Tensor]) -> list[Any]:
    """FSDP2's modules, if the parameters are DTensors; outer ones before those inside them."""
    if model is None or first_dtensor(params) is None:
        return []
    from torch.distributed.fsdp import FSDPModule  # takes a second, which most need not wait for

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def check_synchronizes(model: nn.Module | None, params: list[Tensor]) -> None:
    """Check that FSDP2 averages gradients: otherwise it leaves none to climb along, and adds this
    pass's to that of a later one.

    Raises:
        RuntimeError: ``set_requires_gradient_sync(False)`` or ``set_requires_all_reduce(False)``.
    """
    for module in _sharded_modules(model, params):
        state = module._get_fsdp_state()
        several = hasattr(state, "_fsdp_param_groups")  # from PyTorch 2.13 on
        groups = state._fsdp_param_groups if several else [state._fsdp_param_group]
        known = [group for group in groups if group is not None]
        for name, averages in (
            ("set_requires_gradient_sync", all(group.reduce_grads for group in known)),
            ("set_requires_all_reduce", all(group.all_reduce_grads for group in known)),
        ):
            if not averages:
                raise RuntimeError(
                    f"FSDP2 must average the gradients in every call, as the weights are perturbed "
                    f"along them, got {name}(False); set it to True"
                )


def reshard(model: nn.Module | None, params: list[Tensor]) -> None:
    """FSDP2's modules forget the weights that they have gathered, and gather them in the next pass.

    A forward pass without gradients leaves the gathered weights of the outermost module in place;
    once the weights have moved, those are not what the ranks hold.
    """
    for module in _sharded_modules(model, params):
        module.reshard()


def reset_after_failure(model: nn.Module | None, params: list[Tensor]) -> None:
    """:func:`reshard` after a pass that broke off, which left FSDP2's modules in the middle of it.

    From 2.13 on PyTorch can end that, except for the gradients of gathered weights, to which the
    next backward pass would add: in a pass, these weights are the modules' parameters.
    """
    within: set[nn.Module] = set()
    for module in _sharded_modules(model, params):
        if module not in within and hasattr(module, "reset_iter_state"):
            module.zero_grad()
            module.reset_iter_state()
        within.update(module.modules())
        module.reshard()
