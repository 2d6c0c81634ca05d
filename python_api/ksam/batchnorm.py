"""BatchNorm in a step: one pass updates the running statistics, others normalize as asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _updating(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Those whose running statistics a forward would update."""
    norms = (module for module in modules if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.track_running_stats]


def _set_flag(norms: Iterable[nn.Module], name: str, value: bool) -> None:
    """A plain attribute of modules, without nn.Module's search for a parameter of that name."""
    for norm in norms:
        vars(norm)[name] = value


Statistics = tuple[Tensor, Tensor]  # mean and variance


def _running(norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _average(norms: Sequence[_BatchNorm], of_batch: Mapping[_BatchNorm, Statistics]) -> None:
    """Average a batch's statistics into the running ones, as a training forward does."""
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm in norms:
        for running, new in zip(_running(norm), of_batch[norm], strict=True):
            if norm.momentum is None:  # a cumulative average; its count is on the device
                assert norm.num_batches_tracked is not None
                running += (new - running) / norm.num_batches_tracked
            else:
                runnings, news = by_weight.setdefault(norm.momentum, ([], []))
                runnings.append(running)
                news.append(new)
    for weight, (runnings, news) in by_weight.items():
        torch._foreach_lerp_(runnings, news, weight)


class Norms:
    """What BatchNorm does in the passes of one step.

    Those of its modules count that update running statistics when the step begins.

    Args:
        model: the module that holds it; None: nothing is changed, every pass is as the model is.
        statistics: what passes over a subset normalize with. ``"subset"``: its own statistics.
            ``"matched"``: its own, then scaled and shifted so that the ascent's activations are
            normalized as in the pass over the whole batch (:class:`Matched`); where none came
            before, the ascent is not on the subset, or in SyncBatchNorm, as ``"subset"``.
            ``"full"``: those of the pass over the whole batch, as constants (their variance is the
            unbiased one, as in running statistics). ``"running"``: the running ones, as in
            evaluation.
        matched: what ``"matched"`` keeps between steps.
    """

    def __init__(
        self,
        model: nn.Module | None,
        statistics: str = "subset",
        matched: dict[nn.Module, Matched] | None = None,
    ) -> None:
        self.modules = [] if model is None else _updating(model.modules())
        self._statistics = statistics
        self._matched = {} if matched is None else matched
        self._of_batch: dict[_BatchNorm, Statistics] = {}
        self._has_matched = False

    @contextmanager
    def updating(self, whole: bool) -> Iterator[None]:
        """The pass that updates the running statistics, over the whole batch or a subset."""
        if self._statistics != "full" and not (whole and self._statistics == "matched"):
            yield
            return
        norms = [norm for norm in self.modules if norm.running_mean is not None]
        running = [(norm.momentum, *_running(norm)) for norm in norms]
        for norm, (_, mean, var) in zip(norms, running, strict=True):
            # Buffers of its own, as the backward pass wants to find them as they were. They become
            # the statistics of the batch, or stay the running ones where the pass does not come by.
            norm.running_mean, norm.running_var = self._of_batch[norm] = mean.clone(), var.clone()
            norm.momentum = 1.0
        try:
            yield
        finally:
            for norm, (momentum, mean, var) in zip(norms, running, strict=True):
                norm.momentum, norm.running_mean, norm.running_var = momentum, mean, var
        _average(norms, self._of_batch)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Forwards within normalize with the batch's statistics but leave the running ones alone.

        Without ``track_running_stats`` a training forward touches neither the statistics nor
        ``num_batches_tracked``, whatever the momentum (None included).
        """
        _set_flag(self.modules, "track_running_stats", False)
        try:
            yield
        finally:
            _set_flag(self.modules, "track_running_stats", True)

    @contextmanager
    def of_subset(self, perturbed: bool) -> Iterator[None]:
        """A pass over a subset; the running statistics are left alone."""
        if self._statistics in ("subset", "matched"):
            with self._matching(perturbed), self.frozen():
                yield
            return
        running = {norm: (norm.running_mean, norm.running_var) for norm in self.modules}
        _set_flag(self.modules, "training", False)
        for norm in self.modules:
            norm.running_mean, norm.running_var = self._of_batch.get(norm, running[norm])
        try:
            yield
        finally:
            _set_flag(self.modules, "training", True)
            for norm in self.modules:
                norm.running_mean, norm.running_var = running[norm]

    @contextmanager
    def _matching(self, perturbed: bool) -> Iterator[None]:
        """Modules whose statistics of the whole batch are known normalize by them."""
        norms = [norm for norm in self._of_batch if not isinstance(norm, nn.SyncBatchNorm)]
        if perturbed and not self._has_matched:
            norms = []
        for norm in norms:
            if norm not in self._matched:
                self._matched[norm] = Matched(norm)
            matched = self._matched[norm]
            matched.of_batch, matched.perturbed = self._of_batch[norm], perturbed
            norm.forward = matched  # type: ignore[method-assign, assignment]
        self._has_matched |= not perturbed
        try:
            yield
        finally:
            for norm in norms:
                del norm.forward


class Matched:
    r"""A module's forward with Batch Renormalization (Ioffe 2017) to the whole batch's statistics.

    With :math:`r = \sigma_S / \sigma` and :math:`d = (\mu_S - \mu) / \sigma` is
    :math:`\frac{x - \mu_S}{\sigma_S} r + d = \frac{x - \mu}{\sigma}`: the values are those of the
    whole batch's :math:`\mu, \sigma`, but the gradient is BatchNorm's, through :math:`\mu_S` and
    :math:`\sigma_S`, as r and d are constants: at the perturbed weights those of the unperturbed.

    One object serves a module in all steps, as ``torch.compile`` compiles anew for another.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.of_batch = _running(norm)
        self.perturbed = False
        self.r = self.d = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """BatchNorm with :math:`\\gamma r` for weight and :math:`\\gamma d + \\beta` for bias."""
        norm = self.norm
        if not self.perturbed:
            self.r, self.d = _match(x, self.of_batch, norm.eps)
        weight, bias = self.r, self.d
        if norm.weight is not None:
            weight, bias = norm.weight * weight, norm.weight * bias
        if norm.bias is not None:
            bias = bias + norm.bias
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps)


@torch.no_grad()
def _match(x: Tensor, of_batch: Statistics, eps: float) -> tuple[Tensor, Tensor]:
    """r and d."""
    mean, var = of_batch
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would round the statistics
    own_var, own_mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    sigma = (var + eps).sqrt()
    return (own_var + eps).sqrt() / sigma, (own_mean - mean) / sigma


class Snapshot:
    """The running statistics before a step, to put back if the step fails."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def take(self, norms: Norms) -> None:
        buffers = [b for norm in norms.modules for b in norm._buffers.values() if b is not None]
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
