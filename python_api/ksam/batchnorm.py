"""BatchNorm in a step: one pass updates the running statistics, others normalize as asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ksam import distributed, interrupts
from ksam.identity import same


def _updating(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The BatchNorm modules whose running statistics a forward would update."""
    norms = (module for module in modules if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.track_running_stats]


def _is_made(norm: _BatchNorm) -> bool:
    """False for a LazyBatchNorm that no forward has made yet, else True."""
    mean = norm._buffers["running_mean"]
    return mean is None or not is_lazy(mean)


def _settings(norm: _BatchNorm) -> dict[str, Any]:
    """The present values of :data:`SETTINGS`, among others."""
    settings = vars(norm).copy()
    settings["_buffers"] = settings["_buffers"].copy()
    return settings


Statistics = tuple[Tensor, Tensor]  # mean and variance


def _running(norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _average(of_batch: Mapping[_BatchNorm, Statistics]) -> None:
    """Average a batch's statistics into the running ones, as a training forward does."""
    by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, statistics in of_batch.items():
        for running, new in zip(_running(norm), statistics, strict=True):
            if norm.momentum is None:  # a cumulative average; its count is on the device
                assert norm.num_batches_tracked is not None
                # The count is 0 if no forward has used the module: its statistics stay.
                running += (new - running) / norm.num_batches_tracked.clamp_min(1)
            else:
                runnings, news = by_weight.setdefault(norm.momentum, ([], []))
                runnings.append(running)
                news.append(new)
    for weight, (runnings, news) in by_weight.items():
        torch._foreach_lerp_(runnings, news, weight)


def _can_match(norm: _BatchNorm) -> bool:
    """:class:`Matched` stands in for BatchNorm's own forward, not for one that replaces it."""
    return type(norm).forward is _BatchNorm.forward and "forward" not in vars(norm)


#: What a pass may change of a module: entries of its dictionary.
SETTINGS = ("training", "track_running_stats", "momentum", "forward", "_buffers")


class Norms:
    """What BatchNorm does in the passes of one step.

    Only modules that would update their statistics when the step begins (``training``,
    ``track_running_stats``) are handled.

    Args:
        model: the module that holds it; None: nothing is changed, every pass runs the model as is.
        statistics: what passes over a subset normalize with. ``"subset"``: its own statistics.
            ``"matched"``: its own, then scaled and shifted so that the ascent's activations are
            normalized as in the pass over the whole batch (:class:`Matched`). It is ``"subset"``
            if no such pass came before or the ascent is not on the subset, and for modules whose
            forward is not BatchNorm's own (SyncBatchNorm, a norm with its activation).
            ``"full"``: those of the pass over the whole batch, as constants (their variance is the
            unbiased one, as in running statistics). ``"running"``: the running ones, as in
            evaluation. A module has no single set of statistics if it is called more than once in
            the pass over the whole batch, or if a ``functional_call`` gives it buffers of the
            caller's: it is as ``"subset"`` where that is noticed (:class:`Watched`).
        kept: what ``"matched"`` and ``"full"`` keep between steps.
    """

    def __init__(
        self, model: nn.Module | None, statistics: str = "subset", kept: Forwards | None = None
    ) -> None:
        self.modules = [] if model is None else _updating(model.modules())
        self._statistics = statistics
        self._kept = Forwards() if kept is None else kept
        self._before = {norm: _settings(norm) for norm in self.modules}
        self._of_batch: dict[_BatchNorm, Statistics] = {}
        self._has_matched = False
        # DistributedDataParallel would put rank 0's statistics in place of the batch's own, or of
        # the running ones that the pass before had.
        constant = statistics in ("full", "running")
        self._wrapped = distributed.data_parallel(model) if constant else []

    def put_back(self, *names: str) -> None:
        """Put the modules' settings of these names back to what they were before the step."""
        for norm, before in self._before.items() if names else ():
            settings = vars(norm)
            for name in names:
                if name == "_buffers":
                    settings[name].update(before[name])
                elif name in before:
                    settings[name] = before[name]
                else:
                    settings.pop(name, None)

    @contextmanager
    def updating(self, whole: bool) -> Iterator[None]:
        """The pass that updates the running statistics, over the whole batch or a subset."""
        norms: list[_BatchNorm] = []
        if self._statistics == "full" or (self._statistics == "matched" and whole):
            norms = [n for n in self.modules if n.running_mean is not None and _is_made(n)]
        if self._statistics == "matched":
            norms = list(filter(_can_match, norms))
        if not norms:
            yield
            return
        # Before others replace them, which DistributedDataParallel would take for them.
        distributed.sync_buffers(self._wrapped)
        with (
            distributed.own_buffers(self._wrapped),
            interrupts.undone(lambda: self.put_back("momentum", "forward", "_buffers")),
        ):
            for norm in norms:
                self._watch(norm)
                # Buffers of its own, as the backward pass must find them unchanged. They
                # become the batch's statistics, or stay the running ones where the pass does not
                # call the module.
                mean, var = map(torch.clone, _running(norm))
                settings = vars(norm)
                settings["_buffers"].update(running_mean=mean, running_var=var)
                settings["momentum"] = 1.0
                self._of_batch[norm] = mean, var
            yield
        _average(self._of_batch)

    def _watch(self, norm: _BatchNorm) -> None:
        if norm not in self._kept.watched:
            self._kept.watched[norm] = Watched(norm)
        watched = self._kept.watched[norm]
        watched.start(self._before[norm].get("forward"), self._on_forward)
        # A method, not a callable object: torch.compile then has one program for all modules.
        vars(norm)["forward"] = watched.forward

    def _on_forward(self, norm: _BatchNorm, again: bool) -> None:
        """A module called twice, or with a caller's buffers (``functional_call``), has no single
        set of batch statistics: from here on it runs as an ordinary forward."""
        if norm not in self._of_batch:
            return
        present, before = dict(norm._buffers), self._before[norm]
        of_caller = present["running_mean"] is not self._of_batch[norm][0]
        if not again and not of_caller:
            return
        first = {norm: self._of_batch.pop(norm)}
        norm.momentum = before["momentum"]
        norm._buffers.update(before["_buffers"])
        if again:
            _average(first)
        if of_caller:
            norm._buffers.update(present)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """The backward pass of :meth:`updating`: activation checkpointing runs forwards again.

        With momentum 0 and without the count, these change no running statistics.
        """
        with interrupts.undone(lambda: self.put_back("momentum", "_buffers")):
            self.put_back("forward")
            for norm in self.modules:
                settings = vars(norm)
                settings["momentum"], settings["_buffers"]["num_batches_tracked"] = 0.0, None
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Forwards within normalize with the batch's statistics but leave the running ones alone.

        Without ``track_running_stats`` a training forward touches neither the statistics nor
        ``num_batches_tracked``, whatever the momentum (None included).
        """
        with (
            distributed.own_buffers(self._wrapped),
            # Not a variable of this frame: Ctrl-C just before the block is left would keep it.
            interrupts.undone(lambda: self.put_back("track_running_stats")),
        ):
            # As plain attributes, without nn.Module's search for a parameter of that name. A lazy
            # module's first pass updates its statistics, which it would not make otherwise.
            for norm in filter(_is_made, self.modules):
                vars(norm)["track_running_stats"] = False
            yield

    @contextmanager
    def of_subset(self, perturbed: bool, part: float) -> Iterator[None]:
        """A pass over a ``part`` of the batch; the running statistics are left alone."""
        statistics = self._statistics
        constant: list[_BatchNorm] = []
        if statistics == "running":
            constant = self.modules
        elif statistics == "full":
            constant = list(self._of_batch)
        matches = statistics == "matched" and (self._has_matched or not perturbed)
        changed = ("training", "forward", "_buffers") if constant or matches else ()
        with interrupts.undone(lambda: self.put_back(*changed)), self.frozen():
            for norm in constant:
                vars(norm)["training"] = False
                if statistics == "full":
                    norm.running_mean, norm.running_var = self._of_batch[norm]
            if matches:
                for norm, of_batch in self._of_batch.items():
                    if norm not in self._kept.matched:
                        self._kept.matched[norm] = Matched(norm)
                    self._kept.matched[norm].start(of_batch, part, perturbed)
                    vars(norm)["forward"] = self._kept.matched[norm].forward
                self._has_matched = bool(self._of_batch)
            yield


class Matched:
    r"""A module's forward with Batch Renormalization (Ioffe 2017) to the whole batch's statistics.

    With :math:`r = \sigma_S / \sigma` and :math:`d = (\mu_S - \mu) / \sigma`,
    :math:`\frac{x - \mu_S}{\sigma_S} r + d = \frac{x - \mu}{\sigma}`: the values are those of the
    whole batch's :math:`\mu, \sigma`, but the gradient is BatchNorm's, through :math:`\mu_S` and
    :math:`\sigma_S`, as r and d are constants (those of the unperturbed weights in both passes).
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.of_batch = _running(norm)
        self.part, self.perturbed = 1.0, False
        self.r: Tensor | None = None
        self.d: Tensor | None = None

    def start(self, of_batch: Statistics, part: float, perturbed: bool) -> None:
        """Begin a pass, given the whole batch's mean, unbiased variance, and the part it sees."""
        self.of_batch, self.part, self.perturbed = of_batch, part, perturbed
        if not perturbed:  # else those of the last step would stay if the pass skips the module
            self.r = self.d = None

    def forward(self, input: Tensor) -> Tensor:
        """BatchNorm with :math:`\\gamma r` for weight and :math:`\\gamma d + \\beta` for bias."""
        norm, x = self.norm, input
        if not self.perturbed:
            mean, var = self.of_batch
            values = x.numel() / x.shape[1] / self.part  # per channel, in the whole batch
            biased = var * (1 - 1 / values)  # as the pass over the whole batch normalizes with
            self.r, self.d = _match(x, (mean, biased), norm.eps)
        if self.r is None or self.d is None:  # the ascent's pass did not call it
            return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        weight, bias = self.r, self.d
        if norm.weight is not None:
            weight, bias = norm.weight * weight, norm.weight * bias
        if norm.bias is not None:
            bias = bias + norm.bias
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=norm.eps)


@torch.no_grad()
def _match(x: Tensor, of_batch: Statistics, eps: float) -> tuple[Tensor, Tensor]:
    """Batch Renormalization's r and d for the input x; see :class:`Matched`."""
    mean, var = of_batch
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would round the statistics
    own_var, own_mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    sigma = (var + eps).sqrt()
    return (own_var + eps).sqrt() / sigma, (own_mean - mean) / sigma


class Watched:
    """A module's forward in the pass that updates, which reports each call.

    By the second call its buffers hold the first one's statistics, which it would overwrite.
    Programs of ``torch.compile`` do not report: there a module used twice is updated from its last
    use, and all its uses are matched to that one.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm

    def start(
        self, own: Callable[..., Tensor] | None, on_forward: Callable[[_BatchNorm, bool], None]
    ) -> None:
        """Begin a pass; ``own`` is the module's forward, if it is not its class's."""
        self.own, self.on_forward, self.calls = own, on_forward, 0

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.on_forward(self.norm, self.calls > 1)
        if self.own is not None:
            return self.own(*inputs, **options)
        return type(self.norm).forward(self.norm, *inputs, **options)


class Forwards:
    """Replacement forwards, reused in every step: ``torch.compile`` recompiles for a new object."""

    def __init__(self) -> None:
        self.matched: dict[_BatchNorm, Matched] = {}
        self.watched: dict[_BatchNorm, Watched] = {}


class Snapshot:
    """The running statistics before a step, to put back if the step fails."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._by_kind: list[tuple[list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def take(self, norms: Norms) -> None:
        buffers = [b for norm in norms.modules for b in norm._buffers.values() if b is not None]
        if not same(buffers, self._buffers):  # .to() gives a module new ones
            made = [b for b in buffers if not is_lazy(b)]
            # The lazy ones will be made in the same objects: look again until they are.
            self._buffers = buffers if len(made) == len(buffers) else []
            self._by_kind = _with_copies(made)
        for saved, of_kind in self._by_kind:
            torch._foreach_copy_(saved, of_kind)

    @torch.no_grad()
    def put_back(self) -> None:
        for saved, of_kind in self._by_kind:
            torch._foreach_copy_(of_kind, saved)


def _with_copies(buffers: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Memory for copies, and what is copied, by device and dtype: on a GPU torch copies a list of
    one kind in one launch, but a mixed one, such as statistics with counts, one by one."""
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for buffer in buffers:
        saved, of_kind = kinds.setdefault((buffer.device, buffer.dtype), ([], []))
        saved.append(torch.empty_like(buffer))
        of_kind.append(buffer)
    return list(kinds.values())


def anything_is_compiled() -> bool:
    """Whether ``torch.compile`` has looked at a frame in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return False
    counters = utils.counters  # with fullgraph=True no frames are counted
    return bool(counters["frames"]["total"] or counters["stats"]["unique_graphs"])


@contextmanager
def detector(watch: bool) -> Iterator[list[nn.Module]]:
    """Collects the BatchNorm modules that update their statistics within, if it is to watch.

    Watching hooks every module call in the process, in other threads too: one pass can afford that,
    but not every step. ``torch.compile`` would compile modules once more for the hooks.
    """
    seen: list[nn.Module] = []
    if not watch:
        yield seen
        return
    # Not the thread's identifier: torch.compile warns that it cannot trace the call for it.
    of_thread = threading.local()
    of_thread.watches = True

    def look(module: nn.Module, _: object) -> None:
        if hasattr(of_thread, "watches"):
            seen.extend(_updating([module]))

    handles: list[RemovableHandle] = []

    def stop() -> None:
        for handle in handles:
            handle.remove()

    with interrupts.undone(stop):
        with interrupts.deferred():
            handles.append(nn.modules.module.register_module_forward_pre_hook(look))
        yield seen
