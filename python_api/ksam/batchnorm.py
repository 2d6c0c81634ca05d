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


Statistics = tuple[Tensor | None, Tensor | None]


def _clone(*tensors: Tensor | None) -> Statistics:
    mean, var = (None if tensor is None else tensor.clone() for tensor in tensors)
    return mean, var


@torch.no_grad()
def _average(norm: _BatchNorm, mean: Tensor | None, var: Tensor | None) -> None:
    """Average a batch's statistics into the running ones, as a training forward does."""
    weight: Tensor | float | None = norm.momentum
    if weight is None:
        assert norm.num_batches_tracked is not None
        weight = 1 / norm.num_batches_tracked
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if running is not None and new is not None:
            running += weight * (new - running)


class Norms:
    """What BatchNorm does in the passes of one step.

    Args:
        model: the module that holds it; None: nothing is changed, every pass is as the model is.
        statistics: what passes over a subset normalize with. ``"subset"``: its own statistics.
            ``"full"``: those of the pass over the whole batch, as constants (their variance is the
            unbiased one, as in running statistics). ``"running"``: the running ones, as in
            evaluation.
    """

    def __init__(self, model: nn.Module | None, statistics: str = "subset") -> None:
        self._model = model
        self._statistics = statistics
        self._of_batch: dict[_BatchNorm, Statistics] = {}

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The pass that updates the running statistics."""
        if self._statistics != "full":
            yield
            return
        norms = [n for n in _updating_in(self._model) if n.running_mean is not None]
        running = [(n.momentum, n.running_mean, n.running_var) for n in norms]
        for norm in norms:
            # Buffers of its own, as the backward pass wants to find them as they were.
            norm.running_mean, norm.running_var = _clone(norm.running_mean, norm.running_var)
            norm.momentum = 1.0  # they become the statistics of the batch
        try:
            yield
        finally:
            for norm, (momentum, mean, var) in zip(norms, running, strict=True):
                self._of_batch[norm] = norm.running_mean, norm.running_var
                norm.momentum, norm.running_mean, norm.running_var = momentum, mean, var
                _average(norm, *self._of_batch[norm])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Forwards within normalize with the batch's statistics but leave the running ones alone.

        Without ``track_running_stats`` a training forward touches neither the statistics nor
        ``num_batches_tracked``, whatever the momentum (None included).
        """
        modules = _updating_in(self._model)
        for module in modules:
            module.track_running_stats = False
        try:
            yield
        finally:
            for module in modules:
                module.track_running_stats = True

    @contextmanager
    def of_subset(self) -> Iterator[None]:
        """A pass over a subset; the running statistics are left alone."""
        if self._statistics == "subset":
            with self.frozen():
                yield
            return
        modules = _updating_in(self._model)
        running = {norm: (norm.running_mean, norm.running_var) for norm in modules}
        for norm in modules:
            norm.training = False
            norm.running_mean, norm.running_var = self._of_batch.get(norm, running[norm])
        try:
            yield
        finally:
            for norm in modules:
                norm.training = True
                norm.running_mean, norm.running_var = running[norm]


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
