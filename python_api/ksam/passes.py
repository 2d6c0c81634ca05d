"""The forward and backward passes of one step, over the batch or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import ksam_kernels
from ksam import batchnorm, micro_batches, weight_caches
from ksam.distributed import without_sync
from ksam.parts import Subset
from ksam.selection import recording
from ksam_kernels.checks import FLOATING, check_dtype
from ksam_kernels.compact.tree import batched_tensors, map_tensors
from ksam_kernels.dtensor import first_dtensor
from ksam_kernels.warn import warn

PerSampleLoss = Callable[[Any], Tensor | tuple[Tensor, Any]]
Backward = Callable[[Tensor, Subset], None]


def per_sample(output: Any, samples: int) -> tuple[Tensor, Any]:
    """Split ``losses`` or ``(losses, aux)``; check the losses, and gather those that tensor
    parallelism left as a DTensor."""
    losses, aux = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    check_dtype("losses returned by per_sample_loss", losses, FLOATING)
    parallel = first_dtensor([losses])
    if parallel is not None:
        losses = parallel.full_tensor()
    shape = tuple(losses.shape)
    if shape != (samples,):
        if shape == ():
            advice = "do not average or sum over the samples: use reduction='none'"
        elif shape == (samples, samples):
            advice = f"did ({samples}, 1) and ({samples},) broadcast?"
        elif shape[0] == samples:
            advice = (
                "if these are losses and not the model's output, average over the other "
                "dimensions: losses.flatten(1).mean(1)"
            )
        else:
            advice = (
                "compute them from the function's argument, which may be a part of the batch, "
                "with the samples in dimension 0 of every tensor"
            )
        raise ValueError(
            f"per_sample_loss must return one loss per sample, shape ({samples},), got {shape}; "
            f"{advice}"
        )
    return losses, aux


def containers_copied(batch: Any) -> Any:
    """The batch's tensors in copied containers, from which a function may remove some."""
    return map_tensors(lambda tensor: tensor, batch)


def detached(tree: Any) -> Any:
    """The tree with its tensors detached; other leaves are as they were."""
    return map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, tree)


def joined(parts: list[Tensor]) -> Tensor:
    """What the micro-batches of a pass found, one value for each of its samples."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Found(NamedTuple):
    """What the forward pass over one micro-batch returned."""

    losses: Tensor
    aux: Any
    scores: Tensor | None


@dataclass(frozen=True)
class PassOptions:
    """How the passes of a step are run.

    Attributes:
        step: the number of steps before this one.
        seed: decides what is drawn in the step, together with ``step``.
        whole: whether one of the passes is over the whole batch.
        micro_batch_size: the most samples in one call of the function; None: all at once.
        scored: whether :attr:`Passes.scores` are needed.
        watch: whether to look for BatchNorm that nobody handles.
        has_model: whether a model was given, whose BatchNorm is handled.
        scale: scales a loss before its backward pass.
    """

    step: int
    seed: int
    whole: bool
    micro_batch_size: int | None
    scored: bool
    watch: bool
    has_model: bool
    scale: Callable[[Tensor], Tensor]


class Passes:
    """Runs the passes that a method asks for, and keeps what they found.

    The first pass over the whole batch is the one that updates BatchNorm's running statistics and
    whose losses are reported; in a step without such a pass it is the first pass of all.

    A pass over more than ``micro_batch_size`` samples calls the function on micro-batches, one
    after the other, and takes the gradient of each before the next; their sum is the pass's.

    Attributes:
        batch, samples, step: the whole batch, its size M, the number of steps before this one.
        losses, aux: those of the reported pass, detached.
        subset: the samples selected for the ascent gradient, or if there is no such selection,
            those of the descent; not set before the first of these is chosen.
        before, after: the losses of the ascent's and of the descent's gradient pass.
        taken: passes so far.
    """

    losses: Tensor
    subset: Subset

    def __init__(
        self,
        function: PerSampleLoss,
        batch: Any,
        samples: int,
        options: PassOptions,
        norms: batchnorm.Norms,
        wrapped: list[DistributedDataParallel],
    ) -> None:
        self.batch, self.samples, self.step = batch, samples, options.step
        self.aux: Any = None
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self.taken = 0
        self._function = function
        self._options = options
        self._norms = norms
        self._wrapped = wrapped
        self._scores: Tensor | None = None
        self._reported = False
        # The CPU's generator uses only 32 bits of a seed: both numbers are hashed into them.
        self._seed = (options.seed * 0x9E3779B1 + options.step) % 2**32
        self._generator: torch.Generator | None = None

    def everything(self, keep: int | None = None) -> Subset:
        """The whole batch."""
        return Subset(self.batch, self.samples, keep=keep)

    def select(self, indices: Tensor, weights: Tensor | None = None) -> Subset:
        """The samples at ``indices``, gathered; tensors that required a gradient do so again."""
        batch = ksam_kernels.compact_batch(self.batch, indices)
        differentiated = [whole.requires_grad for whole in batched_tensors(self.batch)]
        if any(differentiated):  # positions, say: forces are derivatives by them
            for rows, wanted in zip(batched_tensors(batch), differentiated, strict=True):
                rows.requires_grad_(wanted)
        return Subset(batch, indices.shape[0], indices, weights)

    def random(self) -> Tensor:
        """Uniform float32 ``[M]`` in [0, 1), determined by the seed and the step.

        Drawn on the device, from a generator of its own: no wait, and a failed step draws the same
        numbers again. The device is that of the reported losses, with which the numbers are
        combined; before there are any, that of the batch, although the model may be on another.
        """
        known = self.losses if self._reported else batched_tensors(self.batch)[0]
        device = known.device
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return torch.rand(
            self.samples, generator=self._generator, dtype=torch.float32, device=device
        )

    def draw(self, size: int) -> Tensor:
        """``size`` random samples without replacement, ascending."""
        return ksam_kernels.topk_indices(self.random(), size)

    def forward(self) -> Tensor:
        """Losses of the whole batch ``[M]`` without gradients."""
        return self._forward(self.everything())

    def forward_top(self, k: int) -> Tensor:
        """Indices of the k highest losses of :meth:`forward`."""
        whole = self.everything(keep=k)
        self._forward(whole)
        assert whole.top is not None
        return whole.top

    def _forward(self, whole: Subset) -> Tensor:
        try:
            with torch.no_grad():
                return self._pass(whole)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                "per_sample_loss takes a derivative, but the pass that selects samples runs "
                "without gradients: take it within torch.enable_grad() (do not call "
                "losses.backward(), which the optimizer does itself)"
            ) from error

    def gradient(self, subset: Subset, factor: Tensor | float | None = None) -> Tensor:
        """Add the gradient of the subset's mean loss, times ``factor`` and scaled, to ``.grad``.

        Returns the subset's losses, detached.
        """

        def backward(losses: Tensor, part: Subset) -> None:
            if losses.requires_grad:
                objective = self._objective(losses, part)
                if part.samples < subset.samples:
                    objective = objective * (part.samples / subset.samples)
                if factor is not None:
                    objective = objective * factor
                self._options.scale(objective).backward()  # type: ignore[no-untyped-call]
            else:
                raise RuntimeError(
                    "per_sample_loss must return losses that require grad, got some without a "
                    "graph: they were detached or computed under no_grad, or nothing that they "
                    "depend on requires grad (are all parameters frozen?)"
                )

        return self._pass(subset, backward)

    def _objective(self, losses: Tensor, part: Subset) -> Tensor:
        if part.top is not None:
            losses = losses.index_select(0, part.top)
        if part.weights is not None:
            losses = losses * part.weights
        return losses.mean()

    def _pass(self, subset: Subset, backward: Backward | None = None) -> Tensor:
        """The samples' losses, detached; ``backward`` is called with those of every micro-batch.

        BatchNorm stays as it is set for the pass until ``backward`` is done, in which activation
        checkpointing runs the forward once more.
        """
        is_whole = subset.indices is None
        reports = not self._reported and (is_whole or not self._options.whole)
        if reports:
            context = self._norms.updating(whole=is_whole)
        elif is_whole:
            context = self._norms.frozen()
        else:
            part = subset.samples / self.samples
            context = self._norms.of_subset(perturbed=self.before is not None, part=part)
        self.taken += 1
        with context, batchnorm.detector(self._watches()) as seen:
            losses = self._in_micro_batches(subset, reports, backward)
            if any(norm not in self._norms.modules for norm in seen):
                _warn_of_batchnorm()
        return losses

    def _watches(self) -> bool:
        """Only in the second pass of a step, as a single one may update what it likes. A user who
        gave a model has most likely given all of it, and should not pay with compilations."""
        options = self._options
        if not options.watch or self.taken != 2:
            return False
        return not (options.has_model and batchnorm.anything_is_compiled())

    def _in_micro_batches(self, subset: Subset, reports: bool, backward: Backward | None) -> Tensor:
        parts = micro_batches.split(subset, self._options.micro_batch_size)
        # The top is found with the losses if these all come at once and it is not known yet.
        at_once = subset.keep if len(parts) == 1 and subset.top is None else None
        found = []
        for part in parts:
            weight_caches.drop()
            with without_sync([] if part is parts[-1] else self._wrapped):
                found.append(self._micro_batch(part, at_once, reports, backward))
        losses = joined([of_part.losses for of_part in found])
        if subset.keep is not None and subset.top is None:
            subset.top = ksam_kernels.topk_indices(losses, subset.keep)
        if reports:
            self.losses, self._reported = losses, True
            scores = [of_part.scores for of_part in found if of_part.scores is not None]
            self._scores = joined(scores) if scores else None
            auxes = [of_part.aux for of_part in found]
            if any(aux is not None for aux in auxes):
                self.aux = auxes[0] if self._options.micro_batch_size is None else auxes
        return losses

    def _micro_batch(
        self, part: Subset, k: int | None, reports: bool, backward: Backward | None
    ) -> _Found:
        """One call of the function; k finds :attr:`Subset.top` too. No result has a graph."""
        is_whole = part.indices is None
        with recording(part.samples if is_whole else -1, k) as recorded:
            losses, aux = per_sample(self._function(containers_copied(part.batch)), part.samples)
            if k is not None:
                part.top = recorded.indices(losses)
            scores = recorded.scores(losses) if reports and self._options.scored else None
            if backward is not None:
                with self._norms.recomputing() if reports else nullcontext():
                    backward(losses, part)
        return _Found(recorded.kept(losses), detached(aux), scores)

    @property
    def scores(self) -> Tensor:
        """Gradient bounds of the reported samples, up to a common factor, float32 ``[M]``.

        See :meth:`ksam.selection.Recording.scores`.

        Raises:
            RuntimeError: nobody said that they are needed; see :attr:`ksam.parts.Sampler.scored`.
        """
        if self._scores is None:
            raise RuntimeError(
                "scores were not computed: a Sampler that reads them must set scored = True"
            )
        return self._scores

    @property
    def knows_the_batch(self) -> bool:
        """Whether the reported losses are there, and are those of the whole batch."""
        return self._reported and self.losses.shape[0] == self.samples

    def highest(self, count: int) -> Tensor:
        """Indices of the highest of the reported losses."""
        return ksam_kernels.topk_indices(self.losses, count)

    def share(self, indices: Tensor) -> Tensor:
        """Share of the reported losses' gradient bounds that these samples carry.

        A float32 scalar on the device; NaN where no sample has a gradient.
        """
        return self.scores[indices].sum() / self.scores.sum()

    def indices(self) -> Tensor:
        """The selected samples, int64, ascending."""
        if self.subset.indices is not None:
            return self.subset.indices
        if self.subset.top is not None:
            return self.subset.top
        return torch.arange(self.samples, device=self.losses.device)


def _warn_of_batchnorm() -> None:
    warn(
        "every pass of a step updates the running statistics of a BatchNorm that the function "
        "uses; to update them once, from the whole batch, pass model= to the optimizer, a module "
        "that contains every BatchNorm (an nn.ModuleList of several modules), and call train() or "
        "eval() before the step, not in the function"
    )
