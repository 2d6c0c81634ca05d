"""The engine: a sharpness-aware step made of parts, over any base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

import ksam_kernels
from ksam import batchnorm, copies, interrupts
from ksam.arguments import check_arguments, check_group
from ksam.backups import Backups
from ksam.base import build_base, parameter_names
from ksam.distributed import begin_anew, data_parallel, gather_anew, mean_over_ranks
from ksam.geometry import Geometry, Moving
from ksam.momentum import Momentum
from ksam.over_base import OverBase
from ksam.parts import Part, Sampler, Subset
from ksam.passes import Passes, PerSampleLoss
from ksam.radius import Rho
from ksam.result import StepResult
from ksam.samplers import All
from ksam.update import Update
from ksam.when import Policy

_PARTS = ("ascent", "descent", "geometry", "when", "otherwise")
_OPTIONS = ("scale", "statistics", "model", "micro_batch_size", "seed", "report_share")


class SharpnessAware(OverBase):
    r"""The engine under every method of the family; the methods are in :mod:`ksam.methods`.

    A step perturbs the weights along an **ascent** direction in a **geometry**, takes the
    **descent** gradient there, returns to the weights bit for bit and lets the base optimizer
    update them; **when** it does not, it takes the base optimizer's step on the whole batch, plain
    or at weights perturbed along its momentum.

    Args:
        params: as for any optimizer; groups may have a ``rho`` of their own. May be None if
            ``base`` is an instance.
        base: the class of the base optimizer, built with ``base_kwargs``, or an instance over the
            same parameters. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are updated by the fused
            kernels, every other base (and these with ``foreach`` or ``fused``, hooks on them, ...)
            by its own ``step()`` on the restored weights. Not with ``maximize``, nor a base that
            calls a hyperparameter rho (Adadelta).
        ascent: the samples whose gradient is climbed, or :class:`~ksam.momentum.Momentum`; None:
            weights are not perturbed.
        descent: the samples whose gradient is descended; None: those of the ascent, which then has
            some.
        geometry: of the perturbation; default: Euclidean.
        rho: radius of the perturbation, >= 0, a function of the step (from 0), or
            :class:`~ksam.radius.ByLearningRate`. It stands in ``param_groups``; the norm is one
            over all groups.
        model: the module whose BatchNorm statistics a step updates exactly once, in the pass over
            the whole batch. Without it every pass updates them. In data-parallel training the
            DistributedDataParallel or what ``fully_shard`` made (FSDP2), over whose ranks a
            policy's shares are averaged.
        when: a function of the step (:class:`ksam.From`, :class:`ksam.EveryNth`, ...) or a policy
            (:class:`ksam.Representative`) that says which steps are sharpness-aware; None: all.
        otherwise: what the other steps climb along before the gradient of the whole batch is taken:
            :class:`~ksam.momentum.Momentum`, which costs no pass; None: nothing, they are plain.
        scale: of the descent loss over n selected of M samples: ``"mean"`` over the n, their sum
            divided by M (``"batch"``), or by M times their share of the gradient bounds
            (``"share"``; as ``"batch"`` where no pass over the batch came before the descent).
            ``"mean"`` alone where Ordered or Importance descends.
        statistics: what BatchNorm normalizes passes over a subset with: the ``"subset"``'s
            statistics, these ``"matched"`` to the full batch's (its values, BatchNorm's gradient:
            Ioffe 2017), the ``"full"`` batch's or the ``"running"`` ones; without ``model`` the
            subset's. See :class:`ksam.batchnorm.Norms` for modules that are as with ``"subset"``.
        micro_batch_size: the most samples that ``per_sample_loss`` is given at once, >= 1: a pass
            over more sums the gradients of several calls, which keep the activations of one only.
            The step is the same, but for rounding and BatchNorm, which sees micro-batches: so
            ``statistics`` is ``"subset"`` or ``"running"``. Not with Ordered, which knows its
            samples after the last of them. None: all at once.
        seed: of methods that draw samples or weights, an int in [0, 2**31); the same in a resumed
            run.
        grad_scaler: scales the losses of both gradients, for float16. A step whose descent gradient
            is not finite leaves weights and state as they were; call ``grad_scaler.update()`` after
            every step, as with any optimizer.
        base_kwargs: for the class of the base optimizer.

    Attributes:
        report_share: compute ``share`` for the result of every step; False at first.

    Raises:
        TypeError, ValueError: an argument out of its range, by name.
    """

    def __init__(
        self,
        params: Iterable[Any] | None,
        base: type[Optimizer] | Optimizer,
        *,
        ascent: Sampler | Momentum | None,
        descent: Sampler | None = None,
        geometry: Geometry | None = None,
        rho: Rho = 0.05,
        model: nn.Module | None = None,
        when: Callable[[int], bool] | Policy | None = None,
        otherwise: Momentum | None = None,
        scale: Literal["mean", "batch", "share"] = "mean",
        statistics: Literal["subset", "matched", "full", "running"] = "subset",
        micro_batch_size: int | None = None,
        seed: int = 0,
        grad_scaler: GradScaler | None = None,
        **base_kwargs: Any,
    ) -> None:
        options = {
            "scale": scale,
            "statistics": statistics,
            "model": model,
            "micro_batch_size": micro_batch_size,
            "seed": seed,
        }
        parts = {"ascent": ascent, "descent": descent, "when": when, "otherwise": otherwise}
        check_arguments({**options, **parts, "geometry": geometry})
        self.ascent, self.descent = ascent, descent
        self.geometry = geometry or Geometry()
        self.when, self.otherwise = when, otherwise
        self.scale, self.statistics = scale, statistics
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.model = model
        self.report_share = False
        self._looked_for_batchnorm = False
        self._scratch()
        super().__init__(build_base(params, base, base_kwargs), rho)
        self._update = Update(self.base, grad_scaler)

    def _scratch(self) -> None:
        """Working memory: part of no checkpoint and no copy."""
        self._backups = Backups()
        self._snapshot = batchnorm.Snapshot()
        self._kept = batchnorm.Kept()

    def _parts(self) -> dict[str, Part]:
        parts = {name: getattr(self, name) for name in _PARTS}
        return {name: part for name, part in parts.items() if isinstance(part, Part)}

    def __getstate__(self) -> dict[str, Any]:
        names = (*_PARTS, *_OPTIONS, "_update", "_looked_for_batchnorm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch()

    def cost(self, samples: int, step: int | None = None) -> float:
        """Cost of a sharpness-aware step on a batch of ``samples``, in units of a plain one.

        Counted: a forward pass over one sample is 1, a backward pass 2, so a plain step is 3M.
        """
        step = self.steps_done if step is None else step
        ascent = self.ascent.cost(samples, step) if isinstance(self.ascent, Sampler) else 0
        if self.descent is not None:
            return (ascent + self.descent.cost(samples, step)) / (3 * samples)
        assert isinstance(self.ascent, Sampler)
        return (ascent + 3 * self.ascent.size(samples, step)) / (3 * samples)

    def selected(self, samples: int, step: int | None = None) -> int:
        """How many of ``samples`` a sharpness-aware step selects; all, where it selects none."""
        step = self.steps_done if step is None else step
        return self._selector(samples, step).selects(samples, step)

    def _selector(self, samples: int, step: int) -> Sampler:
        """The ascent's sampler; the descent's, where the ascent is not on a selection."""
        ascent, descent = self.ascent, self.descent
        if isinstance(ascent, Sampler) and ascent.selects(samples, step) < samples:
            return ascent
        if descent is not None:
            return descent
        assert isinstance(ascent, Sampler)
        return ascent

    def step(self, per_sample_loss: PerSampleLoss, batch: Any) -> StepResult:  # type: ignore[override]
        """One step.

        Args:
            per_sample_loss: ``f(batch) -> losses [B]`` or ``(losses, aux)``; called once for every
                pass, in the model's current mode, on the batch or on the selected samples. K-SAM
                calls it three times: on the batch without gradients, then twice on the selection
                (twice in all, on the batch, where every sample is selected); with
                ``micro_batch_size``, each time once for every micro-batch. What it does to the
                batch's tensors in place must be the same done once or thrice: clamping is, scaling
                is not.
            batch: any tree of tensors with the samples in dimension 0; what else is in it is
                passed on (see :func:`ksam_kernels.compact_batch`).

        Returns:
            A :class:`StepResult`. ``.grad`` holds the descent gradient afterwards.

        Raises:
            RuntimeError: in ``torch.inference_mode()``; losses without a graph.
            TypeError, ValueError: a batch, losses or scheduled values that are not as described.
                Whatever is raised before the base optimizer's own step, by this method or by the
                function, KeyboardInterrupt included: weights and BatchNorm statistics are bit for
                bit what they were. What the base raises in its step may leave its state changed.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step needs gradients, which do not exist in torch.inference_mode(); call it "
                "outside of that"
            )
        samples = ksam_kernels.batch_size(batch)
        if samples == 0:
            raise ValueError("batch must hold at least one sample, got 0")
        for sampler in self._samplers():
            sampler.check(batch, samples)
        self._adopt_groups()
        cost = self.cost(samples)
        sharp = self._is_sharp(cost)
        norms = batchnorm.Norms(self.model, self.statistics if sharp else "subset", self._kept)
        passes = self._passes(per_sample_loss, batch, samples, sharp, norms)
        self._schedule_rho()
        self.zero_grad()
        self._snapshot.take(norms)
        perturbed: dict[Tensor, Tensor] = {}
        done = False
        try:
            with torch.enable_grad():
                result = self._descent_gradient(passes, sharp, perturbed)
                probe = self._probe(result.share)
            with interrupts.deferred():
                self._update(perturbed)
                done = True
                self._finish(passes, cost if sharp else 1.0, probe)
        except BaseException:
            with interrupts.deferred():
                norms.put_back()
                if not done:
                    ksam_kernels.restore_(list(perturbed), list(perturbed.values()))
                    self._snapshot.put_back()
            begin_anew(self.model, self._parameters())
            raise
        finally:
            copies.forget()  # of the perturbed weights
        return result

    def _check_group(self, group: dict[str, Any]) -> None:
        along_momentum = any(isinstance(part, Momentum) for part in (self.ascent, self.otherwise))
        check_group(self.base, group, along_momentum, self.model)

    def _samplers(self) -> list[Sampler]:
        return [part for part in (self.ascent, self.descent) if isinstance(part, Sampler)]

    def _is_sharp(self, cost: float) -> bool:
        if self.when is None:
            return True
        if isinstance(self.when, Policy):
            return self.when.decide(self.steps_done, cost)
        return bool(self.when(self.steps_done))

    def _passes(
        self,
        function: PerSampleLoss,
        batch: Any,
        samples: int,
        sharp: bool,
        norms: batchnorm.Norms,
    ) -> Passes:
        step = self.steps_done
        return Passes(
            function,
            batch,
            samples,
            scale=self._update.scale,
            step=step,
            seed=self.seed,
            whole=not sharp or any(sampler.whole(step) for sampler in self._samplers()),
            norms=norms,
            wrapped=None if self.micro_batch_size is None else data_parallel(self.model),
            micro_batch_size=self.micro_batch_size,
            scored=self._wants_share(sharp) or (sharp and any(s.scored for s in self._samplers())),
            trainable=any(p.requires_grad for p in self._parameters()),
            watch=self.model is None and not self._looked_for_batchnorm,
        )

    def _descent_gradient(
        self, passes: Passes, sharp: bool, perturbed: dict[Tensor, Tensor]
    ) -> StepResult:
        """Climb, and leave the descent gradient in ``.grad``; fills ``perturbed``."""
        ascent, descent = (self.ascent, self.descent) if sharp else (self.otherwise, All())
        norm: Tensor | None = None
        if isinstance(ascent, Sampler):
            passes.subset = ascent.choose(passes)
            passes.before = passes.gradient(passes.subset)
        if ascent is not None:
            norm = self._perturb(ascent, perturbed)
            if norm is not None and isinstance(ascent, Sampler):
                norm = self._update.unscale(norm)
            self.zero_grad()
        subset = passes.subset if descent is None else descent.choose(passes)
        assert subset is not None
        if passes.subset is None or not passes.subset.is_selection:
            passes.subset = subset
        share = self._share(passes, sharp)
        passes.after = passes.gradient(subset, self._factor(passes, subset, share))
        if share is None:
            share = self._share(passes, sharp)
        self._looked_for_batchnorm |= passes.taken > 1
        losses = passes.losses
        if norm is None:
            norm = torch.zeros((), dtype=torch.float32, device=losses.device)
        return StepResult(losses.mean(), losses, passes.indices(), norm, passes.aux, sharp, share)

    def _factor(
        self, passes: Passes, subset: Subset, share: Tensor | None
    ) -> Tensor | float | None:
        """Of the descent's mean loss; ``share`` is that of the step's selection."""
        if subset.indices is None or self.scale == "mean":
            return None
        factor = subset.samples / passes.samples
        if self.scale == "batch" or share is None:
            return factor
        if subset is not passes.subset:  # the ascent has a selection of its own
            share = passes.share(subset.indices)
        # A share of nothing is NaN: where no sample has a gradient.
        return torch.where(share > 0, factor / share, factor)

    def _probes(self) -> bool:
        """Whether the step's share is for a policy."""
        return isinstance(self.when, Policy) and self.when.wants_share(self.steps_done)

    def _wants_share(self, sharp: bool) -> bool:
        return self.report_share or (sharp and self.scale == "share") or self._probes()

    def _share(self, passes: Passes, sharp: bool) -> Tensor | None:
        """What the selection carries, where somebody asks and a pass over the batch tells."""
        if not self._wants_share(sharp) or not passes.knows_the_batch:
            return None
        sampler = self._selector(passes.samples, passes.step)
        return passes.share(sampler.representatives(passes))

    def _perturb(
        self, ascent: Sampler | Momentum, perturbed: dict[Tensor, Tensor]
    ) -> Tensor | None:
        """Climb; every moved parameter stands in ``perturbed`` with its backup."""
        params = self._parameters()
        along: list[Tensor | None]
        if isinstance(ascent, Momentum):
            along = ascent.directions(self.base, params)
            radii = [ascent.radius(group, self.steps_done) for group in self.param_groups]
        else:
            along = [p.grad for p in params]
            radii = [group["rho"] for group in self.param_groups]
        pairs = zip(radii, self.param_groups, strict=True)
        of_params = [radius for radius, group in pairs for _ in group["params"]]
        known = [direction is not None for direction in along]
        if not any(known):
            return None
        params = list(compress(params, known))
        moving = Moving(
            params=params,
            directions=[direction for direction in along if direction is not None],
            backup=self._backups.of(params, self._parameters),
            radii=list(compress(of_params, known)),
            names=[],
        )
        if self.geometry.needs_names:
            names = parameter_names(self.param_groups, self.model)
            moving.names = [names[p] for p in moving.params if p in names]
        with interrupts.deferred():
            norm = self.geometry.perturb(moving, perturbed, f"{self.seed}/{self.steps_done}")
            gather_anew(self.model, params)
        return norm

    def _probe(self, share: Tensor | None) -> Tensor | None:
        """What a policy that asked for the share is told, on all ranks the same."""
        if share is None or not self._probes():
            return None
        return mean_over_ranks(share, self.model, self._parameters())

    def _finish(self, passes: Passes, cost: float, probe: Tensor | None) -> None:
        """The weights are updated: now what the parts learn from the step is final too."""
        # First, as the step is done whatever a part makes of it.
        self.steps_done += 1
        for sampler in self._samplers():
            sampler.observe(passes)
        if isinstance(self.when, Policy):
            self.when.observe(passes.step, cost, probe)

    def _parameters(self) -> list[Tensor]:
        """In every step, so without the look at each entry that ``parameters`` takes."""
        return [p for group in self.param_groups for p in group["params"]]
