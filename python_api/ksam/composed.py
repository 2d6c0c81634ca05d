"""What an optimizer derives from its parts: cost, size of the selection, scale of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from ksam.arguments import Scale, Statistics, check_arguments, check_batch, check_group, check_names
from ksam.distributed import check_synchronizes, has_ranks, mean_over_ranks
from ksam.geometry import Geometry
from ksam.momentum import Momentum
from ksam.parts import Part, Sampler, Subset
from ksam.passes import Passes
from ksam.radius import ByLearningRate
from ksam.update import Update
from ksam.when import Policy
from ksam.wrapper import OptimizerWrapper
from ksam_kernels.warn import warn

_PARTS = ("ascent", "descent", "geometry", "when", "otherwise")
#: Attributes that are checked whenever they are set.
OPTIONS = (*_PARTS, "scale", "statistics", "model", "micro_batch_size", "seed")


class Composed(OptimizerWrapper):
    """The parts of :class:`ksam.optimizer.SharpnessAware`, which documents the arguments."""

    ascent: Sampler | Momentum | None
    descent: Sampler | None
    geometry: Geometry
    when: Callable[[int], bool] | Policy | None
    otherwise: Momentum | None
    scale: Scale
    statistics: Statistics
    model: nn.Module | None
    micro_batch_size: int | None
    seed: int
    report_share: bool
    _update: Update
    _told: set[str]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options are then checked as the constructor checks them."""
        if name == "rho" and self._built and self._perturbs() and not hasattr(type(self), name):
            raise AttributeError(f"rho must be set in param_groups, per group, got rho = {value!r}")
        before = vars(self).get(name)
        super().__setattr__(name, value)
        if name in OPTIONS and self._built:
            try:
                check_arguments(self)
                for group in self.param_groups:
                    self._check_group(group)
            except BaseException:
                super().__setattr__(name, before)
                raise
            if name in _PARTS:  # loading a checkpoint without its state restores this one
                self._initial[name] = copy.deepcopy(self._states().get(name, {}))

    @property
    def grad_scaler(self) -> GradScaler | None:
        """What scales the losses of both gradients; may be set, as some trainers make it late."""
        return self._update.scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: GradScaler | None) -> None:
        self._update = Update(self.base, scaler)

    def _parts(self) -> dict[str, Part]:
        parts = {name: getattr(self, name) for name in _PARTS}
        return {name: part for name, part in parts.items() if isinstance(part, Part)}

    def _perturbs(self) -> bool:
        return self.ascent is not None or self.otherwise is not None

    def cost(self, samples: int, step: int | None = None) -> float:
        """Cost of a sharpness-aware step on a batch of ``samples``, in units of a plain one.

        Counted: a forward pass over one sample is 1, a backward pass 2, so a plain step is 3M.
        """
        step = self.steps_done if step is None else step
        ascent = self.ascent.cost(samples, step) if isinstance(self.ascent, Sampler) else 0
        if self.descent is not None:
            return (ascent + self.descent.cost(samples, step)) / (3 * samples)
        assert isinstance(self.ascent, Sampler)
        return (ascent + 3 * self.ascent.num_evaluated(samples, step)) / (3 * samples)

    def num_selected(self, samples: int, step: int | None = None) -> int:
        """How many of ``samples`` a sharpness-aware step selects; all if it makes no selection."""
        step = self.steps_done if step is None else step
        return self._selector(samples, step).num_selected(samples, step)

    def _selector(self, samples: int, step: int) -> Sampler:
        """The ascent's sampler; the descent's, where the ascent is not on a selection."""
        ascent, descent = self.ascent, self.descent
        if isinstance(ascent, Sampler) and ascent.num_selected(samples, step) < samples:
            return ascent
        if descent is not None:
            return descent
        assert isinstance(ascent, Sampler)
        return ascent

    def _check_group(self, group: dict[str, Any]) -> None:
        along_momentum = any(isinstance(part, Momentum) for part in (self.ascent, self.otherwise))
        check_group(self.base, group, along_momentum, self.model)
        if self.geometry.needs_names:
            check_names(group, self.model)

    def _check_batch(self, batch: Any, samples: int, params: list[Tensor]) -> None:
        """Refuse what a pass of this or a later step could not take, also in a step that selects no
        samples, so that the error comes in the first step and not epochs later."""
        selects = samples > 0 and self.num_selected(samples) < samples
        check_batch(batch, samples, selects or self.micro_batch_size is not None, params)
        for sampler in self._samplers():
            sampler.check(batch, samples)
        if isinstance(self.ascent, Sampler):
            check_synchronizes(self.model, params)

    def _samplers(self) -> list[Sampler]:
        return [part for part in (self.ascent, self.descent) if isinstance(part, Sampler)]

    def _is_sharp(self, cost: float) -> bool:
        if self.when is None:
            return True
        if isinstance(self.when, Policy):
            return self.when.decide(self.steps_done, cost)
        return bool(self.when(self.steps_done))

    def _schedule_rho(self) -> None:
        super()._schedule_rho()
        # The highest learning rate so far may be that of a step that another part takes.
        for part in (self.ascent, self.otherwise):
            if isinstance(part, Momentum) and isinstance(part.rho, ByLearningRate):
                for group in self.param_groups:
                    part.rho.of(group)

    def _probes(self) -> bool:
        """Whether a policy asks for the step's share."""
        return isinstance(self.when, Policy) and self.when.wants_share(self.steps_done)

    def _wants_share(self, sharp: bool) -> bool:
        return self.report_share or (sharp and self.scale == "share") or self._probes()

    def _share(self, passes: Passes, sharp: bool) -> Tensor | None:
        """The selection's share, if it is wanted and a pass over the batch makes it known."""
        if not self._wants_share(sharp) or not passes.knows_the_batch:
            return None
        sampler = self._selector(passes.samples, passes.step)
        return passes.share(sampler.representatives(passes))

    def _factor(
        self, passes: Passes, subset: Subset, share: Tensor | None
    ) -> Tensor | float | None:
        """What ``scale`` multiplies the descent's mean loss by; None: by nothing.

        Args:
            share: that of the step's selection, if it is known.
        """
        if subset.indices is None or self.scale == "mean":
            return None
        factor = subset.samples / passes.samples
        if self.scale == "batch" or share is None:
            return factor
        if subset is not passes.subset:  # the ascent has a selection of its own
            share = passes.share(subset.indices)
        # The share is NaN where no sample has a gradient.
        return torch.where(share > 0, factor / share, factor)

    def _probe(self, share: Tensor | None) -> Tensor | None:
        """What a policy that asked for the share is told; the same on all ranks."""
        if share is None or not self._probes():
            return None
        mean = mean_over_ranks(share, self.model, self._parameters())
        if mean is share and has_ranks():
            # Ranks that train one model, but decide alone, would average the gradients of steps of
            # different kinds.
            self._tell(
                "no step becomes sharpness-aware by the policy: it needs the mean of its share "
                "over the ranks, and the model shows none; pass the DistributedDataParallel module "
                "as model="
            )
            return None
        return mean

    def _finish(self, passes: Passes, cost: float, probe: Tensor | None) -> None:
        """Let the parts learn from the step, which can no longer fail."""
        # First: the step is done, whatever the parts make of it.
        self.steps_done += 1
        for sampler in self._samplers():
            sampler.observe(passes)
        if isinstance(self.when, Policy):
            self.when.observe(passes.step, cost, probe)

    def _look_for_gradients(self) -> None:
        """Warn once, after the descent pass, if the step trains nothing."""
        params = (p for group in self.param_groups for p in group["params"])
        if not any(p.grad is not None for p in params):  # usually the first one has a gradient
            self._tell(
                "the step trains nothing: the losses depend on none of the optimizer's trainable "
                "parameters; if they should, build the optimizer after copying the model, "
                "replacing layers or adding adapters"
            )

    def _look_for_momentum(self) -> None:
        """Warn once if weights do not move because no momentum is found where it is looked for.

        No state at all is no error by itself: there is none before the base's first update.
        """
        if self._update.left_no_state:
            self._tell(
                f"weights are not perturbed: after its step, the base, {type(self.base).__name__}, "
                f"has no momentum of them in its state; if it wraps another optimizer, pass that "
                f"one as base"
            )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            warn(message)
            self._told.add(message)

    def _parameters(self) -> list[Tensor]:
        """All parameters; in every step, so without the checks of :func:`ksam.base.parameters`."""
        params: list[Tensor] = []
        for group in self.param_groups:
            params += group["params"]
        return params

    def _of_parameters(self, values: list[float]) -> list[float]:
        """A group's value for each of its parameters, in the order of the parameters."""
        found: list[float] = []
        for value, group in zip(values, self.param_groups, strict=True):
            found += [value] * len(group["params"])
        return found
