"""The engine: a sharpness-aware step made of parts, over any base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.optim import Optimizer

import ksam_kernels
from ksam import batchnorm, distributed, interrupts, weight_caches
from ksam.arguments import Scale, Statistics, check_arguments, check_call
from ksam.backups import Backups, put_back
from ksam.base import build_base, parameter_names
from ksam.composed import OPTIONS, Composed
from ksam.distributed import averaged, data_parallel
from ksam.geometry import Geometry, Moving
from ksam.gradients import clear, set_aside
from ksam.momentum import Momentum
from ksam.parts import Sampler, Subset
from ksam.passes import Passes, PassOptions, PerSampleLoss
from ksam.radius import DEFAULT_RHO, Rho
from ksam.result import StepResult
from ksam.samplers import All
from ksam.update import Update
from ksam.when import Policy
from ksam.wrapper import check_not_wrapped
from ksam_kernels.checks import check_range

#: What copies and pickles hold in addition to the parent class's attributes.
_OWN = (*OPTIONS, "report_share", "_looked_for_batchnorm", "_update")


class SharpnessAware(Composed):
    r"""The engine under every method of the family; the methods are in :mod:`ksam.methods`.

    A step perturbs the weights along an **ascent** direction in a **geometry**, takes the
    **descent** gradient there, returns to the weights bit for bit and lets the base optimizer
    update them. **When** says which steps do so: the others are the base optimizer's step on the
    whole batch, plain or at weights perturbed along its momentum.

    Args:
        params: as for any optimizer; groups may have a ``rho`` of their own. May be None if
            ``base`` is an instance.
        base: the class of the base optimizer, built with ``base_kwargs``, or an instance over the
            same parameters. The fused kernels make the updates of ``torch.optim.SGD``, ``Adam`` and
            ``AdamW``; every other base (these too with ``foreach`` or ``fused``, hooks on them,
            ...) takes its own ``step()`` on the restored weights. Not with ``maximize``, nor with a
            base that has a hyperparameter called rho (Adadelta).
        ascent: the samples whose gradient is climbed, or :class:`~ksam.momentum.Momentum`; None:
            the weights are not perturbed.
        descent: the samples whose gradient is descended; None: those of the ascent, which must
            then be on samples.
        geometry: of the perturbation; default: Euclidean.
        rho: radius of the perturbation: a number >= 0, a function of the step (from 0), or
            :class:`~ksam.radius.ByLearningRate`. It is kept in ``param_groups``, where a group's
            own rho wins (not what another method over the same base has put there). A single norm
            is taken over all groups.
        model: the module whose BatchNorm statistics a step updates exactly once, in the pass over
            the whole batch. Without it every pass updates them. It must hold every BatchNorm that
            the function uses; set its mode (``train()``, ``eval()``) before the step, not within
            the function. In data-parallel training pass the DistributedDataParallel, or what
            ``fully_shard`` made (FSDP2): a policy's shares are averaged over its ranks.
        when: a function of the step (:class:`ksam.From`, :class:`ksam.EveryNth`, ...) or a policy
            (:class:`ksam.Representative`) that says which steps are sharpness-aware; None: all.
        otherwise: what the other steps climb along before the gradient of the whole batch is taken:
            :class:`~ksam.momentum.Momentum`, which costs no pass; None: nothing, they are plain.
        scale: of the descent loss over n samples selected from M: their ``"mean"``, their sum
            divided by M (``"batch"``), or by M times their share of the gradient bounds
            (``"share"``; as ``"batch"`` where no pass over the batch came before the descent).
            Only ``"mean"`` if the descent is Ordered or Importance.
        statistics: what BatchNorm normalizes with in passes over a subset: the ``"subset"``'s
            statistics, these ``"matched"`` to the full batch's (its values, but BatchNorm's
            gradient: Ioffe 2017), the ``"full"`` batch's or the ``"running"`` ones; without
            ``model`` the subset's. :class:`ksam.batchnorm.Norms` says when a module falls back to
            ``"subset"``.
        micro_batch_size: the most samples that ``per_sample_loss`` is given at once, >= 1. A pass
            over more sums the gradients of several calls, so only one call's activations are kept
            at a time. The step is the same except for rounding and for BatchNorm, which sees
            micro-batches: ``statistics`` must be ``"subset"`` or ``"running"``. Not with Ordered,
            which knows its samples only after the last micro-batch. None: all at once.
        seed: for methods that draw samples or weights, an int in [0, 2**31); the same in a resumed
            run.
        grad_scaler: scales the losses of both gradients, for float16. A step whose descent gradient
            is not finite leaves weights and state as they were; call ``grad_scaler.update()`` after
            every step, as with any optimizer.
        base_kwargs: for the class of the base optimizer.

    Attributes:
        ascent, ..., seed: the arguments except ``rho``, which is kept in ``param_groups``. They may
            be set, each checked then as here: set parts that depend on each other in an order in
            which no combination on the way would be refused here.
        report_share: whether to compute ``share`` for every step's result; False at first.

    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        params: Iterable[Any] | None,
        base: type[Optimizer] | Optimizer,
        *,
        ascent: Sampler | Momentum | None,
        descent: Sampler | None = None,
        geometry: Geometry | None = None,
        rho: Rho = DEFAULT_RHO,
        model: nn.Module | None = None,
        when: Callable[[int], bool] | Policy | None = None,
        otherwise: Momentum | None = None,
        scale: Scale = "mean",
        statistics: Statistics = "subset",
        micro_batch_size: int | None = None,
        seed: int = 0,
        grad_scaler: GradScaler | None = None,
        **base_kwargs: Any,
    ) -> None:
        self.ascent, self.descent = ascent, descent
        self.geometry = Geometry() if geometry is None else geometry
        self.when, self.otherwise = when, otherwise
        self.scale, self.statistics = scale, statistics
        self.model = model
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.report_share = False
        self._looked_for_batchnorm = False
        check_arguments(self)
        self._scratch()
        check_not_wrapped(base)
        super().__init__(build_base(params, base, base_kwargs), rho)
        self._update = Update(self.base, grad_scaler)

    def _scratch(self) -> None:
        """Working memory: part of no checkpoint and no copy."""
        self._backups = Backups()
        self._snapshot = batchnorm.Snapshot()
        self._kept = batchnorm.Forwards()
        self._has_grad = False  # whether .grad is backward()'s, for the next step()
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch()

    @overload  # type: ignore[override]
    def step(self, per_sample_loss: PerSampleLoss, batch: Any) -> StepResult: ...

    @overload
    def step(self, *, closure: Callable[[], Any] | None = None) -> Any: ...

    # Not part of a compiled program: there torch 2.11 cannot set optimizers' attributes, and leaves
    # the base `capturable` on a GPU. (torch.compiler.disable would load the compiler on import.)
    @_disable_dynamo
    def step(
        self,
        per_sample_loss: PerSampleLoss | None = None,
        batch: Any = None,
        *,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """One step; without a function and a batch, the update that :meth:`backward` prepared.

        Args:
            per_sample_loss: ``f(batch) -> losses [B]`` or ``(losses, aux)``; called once for every
                pass, in the model's current mode, on the batch or on the selected samples. K-SAM
                makes three passes: one over the batch without gradients, then two over the
                selection (just two, over the batch, where every sample is selected). With
                ``micro_batch_size`` each pass calls it once for every micro-batch. In-place changes
                to the batch's tensors must have the same effect made once or three times: clamping
                does, scaling does not.
            batch: any tree of tensors with the samples in dimension 0; anything else in it is
                passed on (see :func:`ksam_kernels.compact_batch`). Leaves that require a gradient
                do so in every pass.
            closure: for trainers that pass one: called once, first, as torch's optimizers do.

        Returns:
            A :class:`StepResult`; ``.grad`` then holds the descent gradient, and what it held
            before is gone. Without a function and a batch: what the closure returned, or None;
            ``.grad`` is left as it was.

        Raises:
            RuntimeError: in ``torch.inference_mode()``; losses without a graph. Without a function
                and a batch: :meth:`backward` was not called since the last step, or the gradients
                are still scaled.
            TypeError, ValueError: a batch, losses or scheduled values that are not as described.

        If anything is raised before the base optimizer's own step, by this method or the function,
        KeyboardInterrupt included, weights and BatchNorm statistics are bit for bit what they were.
        If the base raises in its step, its state may be left changed.
        """
        if per_sample_loss is None and batch is None:
            return self._step_by_grad(closure)
        check_call(per_sample_loss, batch, " (pass a closure by name: step(closure=...))")
        assert per_sample_loss is not None
        if closure is not None:
            raise TypeError(f"closure must be None with per_sample_loss and batch, got {closure!r}")
        return self._run(per_sample_loss, batch, weight=None)

    @_disable_dynamo
    def backward(
        self, per_sample_loss: PerSampleLoss, batch: Any, *, weight: float = 1.0
    ) -> StepResult:
        """A step up to the update, for loops and trainers that make the update by a separate
        :meth:`step`: the descent gradient is added to ``.grad``, as ``loss.backward()`` would.

        ::

            optimizer.zero_grad()
            result = optimizer.backward(loss, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        Afterwards the weights are bit for bit what they were; restoring them takes a pass over them
        that ``step(per_sample_loss, batch)`` saves. To the parts of a method this call is the step,
        numbered ``steps_done``: schedules and policies count these calls.

        Args:
            per_sample_loss, batch: as for :meth:`step`.
            weight: of the batch's gradient in the sum, >= 0: 1 / n for the mean over the n batches
                of n calls. The ascent direction depends neither on it nor on what ``.grad`` held.

        Returns:
            A :class:`StepResult`.

        Raises:
            RuntimeError, TypeError, ValueError: as :meth:`step`, or ``.grad`` has been unscaled.
                After an error in the descent pass (with FSDP2, in any pass) ``.grad`` holds neither
                the old sum nor the new one: call ``zero_grad()``.
        """
        check_call(per_sample_loss, batch)
        check_range("weight", weight, 0.0)
        self._update.check_scaled(self)
        return self._run(per_sample_loss, batch, weight=weight)

    def _step_by_grad(self, closure: Callable[[], Any] | None) -> Any:
        """The base optimizer's step with ``.grad``."""
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        if not self._has_grad:
            raise RuntimeError(
                "step() without a function and a batch needs the gradients of "
                "optimizer.backward(per_sample_loss, batch), which was not called since the last "
                "step; call it instead of loss.backward()"
            )
        self._update.check_unscaled(self)
        with interrupts.deferred():
            self._update.by_grad()
            self._has_grad = False
            distributed.reshard(self.model, self._parameters())
        weight_caches.drop()
        return returned

    def _run(
        self, per_sample_loss: PerSampleLoss, batch: Any, *, weight: float | None
    ) -> StepResult:
        """Take the gradients and update; with a weight, only add the gradient to ``.grad``."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "step and backward need gradients, which torch.inference_mode() turns off; call "
                "them outside of it"
            )
        samples = ksam_kernels.batch_size(batch)
        self._adopt_groups()
        params = self._parameters()
        self._check_batch(batch, samples, params)
        cost = self.cost(samples)
        sharp = self._is_sharp(cost)
        norms = batchnorm.Norms(self.model, self.statistics if sharp else "subset", self._kept)
        passes = self._passes(per_sample_loss, batch, samples, sharp, norms)
        self._schedule_rho()
        if weight is None:
            clear(params)
            self._has_grad = False
        self._snapshot.take(norms)
        perturbed: dict[Tensor, Tensor] = {}
        done = False
        try:
            with torch.enable_grad():
                result = self._descent_gradient(passes, sharp, perturbed, weight)
                probe = self._probe(result.share)
            with interrupts.deferred():
                if weight is None:
                    self._update(perturbed)
                else:
                    put_back(perturbed)
                done = True
                self._has_grad = weight is not None
                distributed.reshard(self.model, params)
                self._finish(passes, cost if sharp else 1.0, probe)
        except BaseException:
            with interrupts.deferred():
                norms.put_back(*batchnorm.SETTINGS)
                if not done:
                    put_back(perturbed)
                    self._snapshot.put_back()
            distributed.reset_after_failure(self.model, params)
            raise
        finally:
            weight_caches.drop()  # of the perturbed weights
        return result

    def _passes(
        self,
        function: PerSampleLoss,
        batch: Any,
        samples: int,
        sharp: bool,
        norms: batchnorm.Norms,
    ) -> Passes:
        step, samplers = self.steps_done, self._samplers()
        options = PassOptions(
            step=step,
            seed=self.seed,
            whole=not sharp or any(sampler.sees_batch(step) for sampler in samplers),
            micro_batch_size=self.micro_batch_size,
            scored=self._wants_share(sharp) or (sharp and any(s.scored for s in samplers)),
            watch=not self._looked_for_batchnorm,
            has_model=self.model is not None,
            scale=self._update.scale,
        )
        wrapped = [] if self.micro_batch_size is None else data_parallel(self.model)
        return Passes(function, batch, samples, options, norms, wrapped)

    def _descent_gradient(
        self,
        passes: Passes,
        sharp: bool,
        perturbed: dict[Tensor, Tensor],
        weight: float | None,
    ) -> StepResult:
        """Climb, and add the descent gradient to ``.grad``; fills ``perturbed``."""
        ascent, descent = (self.ascent, self.descent) if sharp else (self.otherwise, All())
        norm: Tensor | None = None
        climbed: Subset | None = None
        if isinstance(ascent, Sampler):
            params = self._parameters()
            with set_aside(params) as accumulates:
                passes.subset = climbed = ascent.choose(passes)
                with averaged(self.model, params, accumulates):
                    passes.before = passes.gradient(climbed)
                norm = self._perturb(ascent, perturbed)
            if norm is not None:
                norm = self._update.unscale(norm)
        elif ascent is not None:
            norm = self._perturb(ascent, perturbed)
        subset = climbed if descent is None else descent.choose(passes)
        assert subset is not None
        if climbed is None or not climbed.is_selection:
            passes.subset = subset
        share = self._share(passes, sharp)
        factor = self._factor(passes, subset, share)
        if weight is not None:
            factor = weight if factor is None else weight * factor
        passes.after = passes.gradient(subset, factor)
        self._look_for_gradients()
        if share is None:
            share = self._share(passes, sharp)
        self._looked_for_batchnorm |= passes.taken > 1
        losses = passes.losses
        if norm is None:
            norm = torch.zeros((), dtype=torch.float32, device=losses.device)
        return StepResult(losses.mean(), losses, passes.indices(), norm, passes.aux, sharp, share)

    def _perturb(
        self, ascent: Sampler | Momentum, perturbed: dict[Tensor, Tensor]
    ) -> Tensor | None:
        """Climb, and enter every moved parameter into ``perturbed`` with its backup."""
        params = self._parameters()
        along: list[Tensor | None]
        if isinstance(ascent, Momentum):
            along = ascent.directions(self.base, params)
            radii = [ascent.radius(group, self.steps_done) for group in self.param_groups]
        else:
            along = [p.grad for p in params]
            radii = [group["rho"] for group in self.param_groups]
        moving = Moving.along(params, along, self._of_parameters(radii))
        if not moving.params:
            if isinstance(ascent, Momentum):
                self._look_for_momentum()
            return None
        moving.backup = self._backups.of(moving.params, self._parameters)
        if self.geometry.needs_names:
            names = parameter_names(self.param_groups, self.model)
            moving.names = [names[p] for p in moving.params if p in names]
        with interrupts.deferred():
            norm = self.geometry.perturb(moving, perturbed, f"{self.seed}/{self.steps_done}")
            distributed.reshard(self.model, params)
        return norm
