"""BatchNorm's running statistics: updated by one pass over the whole batch, by no other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _updating(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Those whose running statistics a forward would update."""
    norms = (module for module in modules if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.track_running_stats]


def _updating_in(model: nn.Module | None) -> list[_BatchNorm]:
    return [] if model is None else _updating(model.modules())


@contextmanager
def frozen(model: nn.Module | None) -> Iterator[None]:
    """Forwards within normalize with the batch's statistics but leave the running ones alone.

    Without ``track_running_stats`` a training forward touches neither the statistics nor
    ``num_batches_tracked``, whatever the momentum (None included).
    """
    modules = _updating_in(model)
    for module in modules:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in modules:
            module.track_running_stats = True


class Snapshot:
    """The running statistics before a step, to put back if the step fails."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def take(self, model: nn.Module | None) -> None:
        buffers = [b for norm in _updating_in(model) for b in norm.buffers(recurse=False)]
        # .to() gives a module new buffers.
        if list(map(id, buffers)) != list(map(id, self._buffers)):
            self._buffers, self._saved = buffers, [torch.empty_like(b) for b in buffers]
        if buffers:
            torch._foreach_copy_(self._saved, self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved)


@contextmanager
def detector(watch: bool) -> Iterator[list[nn.Module]]:
    """Collects the BatchNorm modules that update their statistics within, if it is to watch.

    Watching hooks every module call of the process, which one pass can afford, not every step.
    """
    seen: list[nn.Module] = []
    if not watch:
        yield seen
        return

    def look(module: nn.Module, _: object) -> None:
        seen.extend(_updating([module]))

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
