"""The K-SAM optimizer: two gradients on the k highest-loss samples, one base-optimizer update."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ksam_kernels
from ksam import batchnorm, interrupts
from ksam.selection import K, Schedule, check_k, check_rho, selection_pass, subset_size
from ksam.update import restore_and_update

PerSampleLoss = Callable[[Any], Any]


class StepResult(NamedTuple):
    """What a step computed, as device tensors: reading one waits for the device, the step does not.

    Attributes:
        loss: mean loss over the batch at the weights before the step, a scalar.
        losses: loss of every sample, ``[B]``, of the same pass.
        indices: the selected samples, int64 ``[k]``, ascending.
        grad_norm: norm of the ascent gradient, float32 scalar; 0, inf or NaN mean that the descent
            gradient was taken at the unperturbed weights.
        aux: the second value of the loss function's first call, if it returns two; else None.
    """

    loss: Tensor
    losses: Tensor
    indices: Tensor
    grad_norm: Tensor
    aux: Any


def _per_sample(output: Any, samples: int) -> tuple[Tensor, Any]:
    """Split ``losses`` or ``(losses, aux)`` and check the losses."""
    losses, aux = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"per_sample_loss must return a tensor of losses, got {type(losses).__name__}"
        )
    if tuple(losses.shape) != (samples,):
        raise ValueError(
            f"per_sample_loss must return one loss per sample, shape ({samples},), got "
            f"{tuple(losses.shape)}; a scalar is a mean: use reduction='none'"
        )
    if not losses.is_floating_point():
        raise TypeError(f"per_sample_loss must return floating losses, got {losses.dtype}")
    return losses, aux


def _check_no_overlap(params: Sequence[Tensor]) -> None:
    """Two parameters on the same memory would be perturbed twice and restored once."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize, i)
        for i, p in enumerate(params)
        if p.numel() > 0
    )
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"params {min(i, j)} and {max(i, j)} share memory; tie them as one Parameter"
            )


class KSAM(Optimizer):
    r"""Sharpness-aware minimization on the k highest-loss samples of each batch (Ni et al. 2022).

    A step selects the k samples S with the highest loss, climbs to
    :math:`\hat w = w + \rho\, g / \lVert g \rVert_2` along their gradient :math:`g`, takes the
    gradient of the same samples there, returns to w bit for bit and lets the base optimizer update
    it. In units of a forward pass over one sample it costs M + 6k, SGD costs 3M: the same at
    k = M/3. With k = 1.0 it is SAM (Foret et al. 2020), with ``adaptive`` ASAM (Kwon et al. 2021).

    Args:
        params: as for any optimizer; groups may have a ``rho`` of their own. May be None if
            ``base`` is an instance.
        base: the class of the base optimizer, built with ``base_kwargs``, or an instance over the
            same parameters. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are updated by the fused
            kernels, every other base (and these with ``foreach`` or ``fused``, hooks on them, ...)
            by its own ``step()`` on the restored weights.
        rho: radius of the perturbation, >= 0, or a function of the step (from 0). It stands in
            ``param_groups``; the norm is one over all groups.
        k: samples selected: a fraction of the batch in (0, 1] (float), a count (int), or a function
            of the step that returns either.
        adaptive: weight the perturbation by :math:`T = |w| + \eta`.
        eta: the floor of T, >= 0.
        model: the module whose BatchNorm statistics a step updates exactly once, in the pass over
            the whole batch. Without it every pass updates them.
        base_kwargs: for the class of the base optimizer.

    Raises:
        TypeError, ValueError: an argument out of its range, by name.
    """

    def __init__(
        self,
        params: Iterable[Any] | None,
        base: type[Optimizer] | Optimizer,
        *,
        rho: float | Schedule = 0.05,
        k: K | Schedule = 1 / 3,
        adaptive: bool = False,
        eta: float = 0.0,
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        self.k = k if callable(k) else check_k(k)
        self.adaptive = adaptive
        self.eta = check_rho(eta, "eta")
        self.model = model
        self.steps_done = 0
        self._rho = rho if callable(rho) else check_rho(rho)
        self._rho_schedules: list[Schedule | None] = []
        self._looked_for_batchnorm = False
        self._scratch()
        self.base = _build_base(params, base, base_kwargs)
        _check_takes_no_closure(self.base)
        _check_no_overlap(_parameters(self.base.param_groups))
        super().__init__(self.base.param_groups, dict(self.base.defaults))
        self._share()

    def _scratch(self) -> None:
        """Working memory: part of no checkpoint and no copy."""
        self._backup: dict[Tensor, Tensor] = {}
        self._statistics = batchnorm.Snapshot()

    def _share(self) -> None:
        """One list of groups and one state, whoever looks: schedulers, the base, checkpoints."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with the default rho unless the group has its own."""
        rho = param_group.get("rho", self._rho)
        value = check_rho(rho(self.steps_done) if callable(rho) else rho)
        if not any(param_group is group for group in self.base.param_groups):
            if not isinstance(param_group["params"], Tensor):
                param_group["params"] = list(param_group["params"])
            _check_no_overlap(_parameters([*self.base.param_groups, param_group]))
            self.base.add_param_group(param_group)
        param_group["rho"] = value
        self._rho_schedules.append(rho if callable(rho) else None)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, and under ``"ksam"`` the number of steps done."""
        return {**self.base.state_dict(), "ksam": {"steps_done": self.steps_done}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; a plain base optimizer's is taken too, as step 0."""
        rhos = [group["rho"] for group in self.param_groups]
        own = {name: value for name, value in state_dict.items() if name != "ksam"}
        self.base.load_state_dict(own)
        self._share()
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)
        self.steps_done = int(state_dict.get("ksam", {}).get("steps_done", 0))

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "k", "adaptive", "eta", "model", "steps_done")
        private = ("_rho", "_rho_schedules", "_looked_for_batchnorm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own + private}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch()
        self._share()

    def step(self, per_sample_loss: PerSampleLoss, batch: Any) -> StepResult:  # type: ignore[override]
        """One K-SAM step.

        Args:
            per_sample_loss: ``f(batch) -> losses [B]`` or ``(losses, aux)``. Called three times in
                the model's current mode: on the batch without gradients, then twice on the selected
                samples. Twice in all, on the batch, where every sample is selected.
            batch: any tree of tensors with the samples in dimension 0; what else is in it is
                passed on (see :func:`ksam_kernels.compact_batch`).

        Returns:
            A :class:`StepResult`. ``.grad`` holds the descent gradient afterwards.

        Raises:
            TypeError, ValueError: a batch, losses or scheduled values that are not as described.
                Whatever is raised, by this method or by the function, KeyboardInterrupt included:
                weights and BatchNorm statistics are bit for bit what they were.
        """
        samples = ksam_kernels.batch_size(batch)
        if samples == 0:
            raise ValueError("batch must hold at least one sample, got 0")
        k = subset_size(check_k(self.k(self.steps_done) if callable(self.k) else self.k), samples)
        self._schedule_rho()
        self.zero_grad()
        self._statistics.take(self.model)
        perturbed: dict[Tensor, Tensor] = {}
        try:
            with torch.enable_grad():
                result = self._descent_gradient(per_sample_loss, batch, samples, k, perturbed)
            with interrupts.deferred():
                restore_and_update(self.base, perturbed)
                perturbed.clear()
                self.steps_done += 1
        except BaseException:
            with interrupts.deferred():
                ksam_kernels.restore_(list(perturbed), list(perturbed.values()))
                self._statistics.put_back()
            raise
        return result

    def _schedule_rho(self) -> None:
        schedules = self._rho_schedules
        values = [
            check_rho(schedule(self.steps_done) if schedule else group["rho"])
            for schedule, group in zip(schedules, self.param_groups, strict=True)
        ]
        for group, value in zip(self.param_groups, values, strict=True):
            group["rho"] = value

    def _descent_gradient(
        self,
        per_sample_loss: PerSampleLoss,
        batch: Any,
        samples: int,
        k: int,
        perturbed: dict[Tensor, Tensor],
    ) -> StepResult:
        """Select, climb, and leave the descent gradient in ``.grad``; fills ``perturbed``."""
        if k < samples:
            losses, aux, indices = self._select(per_sample_loss, batch, samples, k)
            batch = ksam_kernels.compact_batch(batch, indices)
            with batchnorm.frozen(self.model):
                self._gradient(per_sample_loss, batch, k)
        else:
            losses, aux = self._gradient(per_sample_loss, batch, samples)
            indices = torch.arange(samples, device=losses.device)
        norm = self._perturb(perturbed, losses.device)
        self.zero_grad()
        with batchnorm.frozen(self.model):
            self._gradient(per_sample_loss, batch, k)
        return StepResult(losses.mean(), losses, indices, norm, aux)

    def _select(
        self, per_sample_loss: PerSampleLoss, batch: Any, samples: int, k: int
    ) -> tuple[Tensor, Any, Tensor]:
        """The pass over the whole batch without gradients, and the indices of its k largest."""
        watch = self.model is None and not self._looked_for_batchnorm
        with selection_pass(samples, k) as selection, batchnorm.detector(watch) as seen:
            losses, aux = _per_sample(per_sample_loss(batch), samples)
            indices = selection.indices(losses)
        if seen:
            warnings.warn(
                "the model has BatchNorm whose running statistics every pass of a step updates; "
                "pass model= to KSAM to update them once, from the whole batch",
                stacklevel=5,
            )
        self._looked_for_batchnorm = True
        return losses, aux, indices

    def _gradient(
        self, per_sample_loss: PerSampleLoss, batch: Any, samples: int
    ) -> tuple[Tensor, Any]:
        """``.grad`` of the mean loss; the losses without their graph."""
        losses, aux = _per_sample(per_sample_loss(batch), samples)
        if losses.requires_grad:
            losses.mean().backward()  # type: ignore[no-untyped-call]
        elif any(p.requires_grad for p in _parameters(self.param_groups)):
            raise RuntimeError(
                "per_sample_loss returned losses without a graph although parameters require grad; "
                "do not detach them and do not compute them under no_grad"
            )
        return losses.detach(), aux

    def _perturb(self, perturbed: dict[Tensor, Tensor], device: torch.device) -> Tensor:
        """Climb along ``.grad``; every moved parameter stands in ``perturbed`` with its backup."""
        moving = [
            (p, p.grad, group["rho"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not moving:
            return torch.zeros((), device=device)
        params, grads, radii = map(list, zip(*moving, strict=True))
        backup = [self._backup_of(p) for p in params]
        with interrupts.deferred():
            norm = ksam_kernels.perturb_(
                params, grads, backup, rho=radii, adaptive=self.adaptive, eta=self.eta
            )
            perturbed.update(zip(params, backup, strict=True))
        return norm

    def _backup_of(self, param: Tensor) -> Tensor:
        """Kept between steps: stable addresses, and no allocation in the loop."""
        backup = self._backup.get(param)
        if (
            backup is None
            or backup.shape != param.shape
            or backup.dtype != param.dtype
            or backup.device != param.device
        ):
            backup = self._backup[param] = torch.empty_like(param, requires_grad=False)
        return backup


def _build_base(
    params: Iterable[Any] | None, base: type[Optimizer] | Optimizer, base_kwargs: dict[str, Any]
) -> Optimizer:
    """The base optimizer, built here or given."""
    if isinstance(base, type) and issubclass(base, Optimizer):
        if params is None:
            raise ValueError("params must be given when base is a class, got None")
        return base(params, **base_kwargs)
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be an optimizer or the class of one, got {base!r}")
    if base_kwargs:
        raise TypeError(f"base is already built, but got arguments for it: {sorted(base_kwargs)}")
    own = _parameters(base.param_groups)
    given = own if params is None else _parameters(params)
    if set(map(id, given)) != set(map(id, own)):
        raise ValueError("params must be those of the base optimizer instance, or None")
    return base


def _parameters(entries: Iterable[Any]) -> list[Tensor]:
    """The tensors of what an optimizer takes: tensors, (name, tensor) pairs, or groups of them."""
    found: list[Tensor] = []
    for entry in entries:
        if isinstance(entry, dict):
            params = entry["params"]
            found += [params] if isinstance(params, Tensor) else _parameters(params)
        else:
            found.append(entry[1] if isinstance(entry, tuple) else entry)
    return found


def _check_takes_no_closure(base: Optimizer) -> None:
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"base {type(base).__name__} needs a closure, which a K-SAM step has not")
