"""Restore the weights and update them: fused with torch's own SGD, Adam and AdamW, else in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import SGD, Adam, AdamW, Optimizer

import ksam_kernels
from ksam.backups import put_back
from ksam_kernels.checks import FLOATING

_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")
_NUMBERS = ("momentum", "dampening", "eps", "weight_decay")


def _plain(base: Optimizer) -> bool:
    """Whether ``base.step`` is as its class made it: no hooks, and no scheduler has wrapped it."""
    return (
        "step" not in vars(base)
        and not base._optimizer_step_pre_hooks
        and not base._optimizer_step_post_hooks
    )


def _is_rate(lr: Any, params: list[Tensor]) -> bool:
    """Whether the kernels take this learning rate: a number, or one float32 element on the device
    of the weights, as torch's schedulers fill it in."""
    if not isinstance(lr, Tensor):
        return True
    is_element = lr.dtype == torch.float32 and lr.numel() == 1
    return is_element and all(p.device == lr.device for p in params)


def _fusable(group: dict[str, Any]) -> bool:
    numbers = *(group.get(name) for name in _NUMBERS), *group.get("betas", ())
    return not (
        group["foreach"]
        or group["fused"]
        or group["differentiable"]
        or group.get("amsgrad")
        or any(isinstance(number, Tensor) for number in numbers)
        or not _is_rate(group["lr"], group["params"])
    )


def can_fuse(base: Optimizer) -> bool:
    """Whether it is exactly torch's SGD, Adam or AdamW, with options that the kernels have."""
    if type(base) not in (SGD, Adam, AdamW) or not _plain(base):
        return False
    return all(
        _fusable(group) and {p.dtype for p in group["params"]}.issubset(FLOATING)
        for group in base.param_groups
    )


def _step_counter(param: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """By default torch keeps Adam's step on the CPU; the kernels need it on the device.

    ``torch.full`` fills it there; ``torch.tensor(value, device=...)`` would copy and wait.
    """
    if isinstance(value, Tensor):
        return value.to(param.device, torch.float32, non_blocking=True)
    return torch.full((), value, dtype=torch.float32, device=param.device)


def _sgd(
    base: Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    buffers, steps = [], []
    # The first momentum is not dampened. Without dampening it follows from a buffer of zeros, and
    # there is no need to know which steps are first.
    counts = group["dampening"] != 0
    for p in params if group["momentum"] != 0 else []:
        state = base.state[p]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["momentum_buffer"] = buffer
            if counts:
                state["step"] = _step_counter(p)
        elif counts and "step" not in state:  # torch's own SGD counts none: the buffer has a past
            state["step"] = _step_counter(p, 1.0)
        buffers.append(buffer)
        if counts:
            steps.append(state["step"])
    ksam_kernels.restore_sgd_(
        params,
        backup,
        grads,
        buffers,
        steps=steps or None,
        found_inf=found_inf,
        **{name: group[name] for name in _SGD_OPTIONS},
    )


def _adam(
    base: Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    states = [base.state[p] for p in params]
    for p, state in zip(params, states, strict=True):
        if not state:
            state["step"] = _step_counter(p)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        step = state["step"]
        if step.device != p.device or step.dtype != torch.float32:
            state["step"] = _step_counter(p, step)
    ksam_kernels.restore_adam_(
        params,
        backup,
        grads,
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
        **{name: group[name] for name in _ADAM_OPTIONS},
        decoupled_weight_decay=group["decoupled_weight_decay"],
        found_inf=found_inf,
    )


class Update:
    """Puts the backed-up weights back and takes the base optimizer's step with ``.grad``.

    With a scaler, ``.grad`` is that of the scaled loss: it is unscaled first, in place as
    ``scaler.unscale_`` does it, and where it is not finite only the weights are put back.

    Args:
        base: the base optimizer.
        scaler: what has scaled the gradients; None: nothing.

    Attributes:
        left_no_state: the base has taken a step with gradients, and none of their parameters has
            an entry in ``base.state`` since.

    Raises:
        TypeError: a scaler of another type.
    """

    def __init__(self, base: Optimizer, scaler: GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler or None, got {scaler!r}")
        self.base = base
        self.scaler = scaler
        self.left_no_state = False
        self._in_kernels = _InKernels(base)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, norm: Tensor) -> Tensor:
        """The norm that the gradients of the unscaled loss would have."""
        return norm if self.scaler is None else norm / self.scaler.scale(torch.ones_like(norm))

    def __call__(self, backup: dict[Tensor, Tensor]) -> None:
        """Take the step.

        Args:
            backup: perturbed parameter -> its weights before the perturbation.
        """
        optimizer: Any
        arguments: tuple[dict[Tensor, Tensor], ...]
        if can_fuse(self.base):
            optimizer, arguments = self._in_kernels, (backup,)
        else:
            put_back(backup)
            optimizer, arguments = self.base, ()
        if self.scaler is None:
            optimizer.step(*arguments)
            if optimizer is self.base:
                self._look_for_state()
        else:
            self.scaler.unscale_(optimizer)
            try:
                self.scaler.step(optimizer, *arguments)
            except BaseException:
                if self.scaler.is_enabled():
                    # The next step has new gradients, which it may unscale.
                    self.scaler._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY
                raise

    def by_grad(self) -> None:
        """Step with ``.grad`` as it is, from weights that were not perturbed or are restored."""
        if can_fuse(self.base):
            self._in_kernels.found_inf = None  # perhaps left by a step that failed
            self._in_kernels.step({})
        else:
            self.base.step()
            self._look_for_state()

    def _look_for_state(self) -> None:
        params = (p for group in self.base.param_groups for p in group["params"])
        has_state = (p in self.base.state for p in params if p.grad is not None)
        # Usually the first has. Without any gradient nothing is known.
        self.left_no_state = not (next(has_state, True) or any(has_state))

    def check_unscaled(self, optimizer: Optimizer) -> None:
        """Refuse scaled gradients: they are for ``scaler.step(optimizer)``, which calls this one.

        Raises:
            RuntimeError: the gradients are still scaled.
        """
        if self._stage(optimizer) not in (None, OptState.UNSCALED):
            raise RuntimeError(
                "gradients are still scaled by grad_scaler: call grad_scaler.step(optimizer) "
                "instead of step(); it unscales them first"
            )

    def check_scaled(self, optimizer: Optimizer) -> None:
        """Refuse to add scaled gradients to those that ``scaler.unscale_(optimizer)`` has unscaled.

        Raises:
            RuntimeError: it has unscaled them, or ``scaler.step(optimizer)`` has.
        """
        if self._stage(optimizer) not in (None, OptState.READY):
            raise RuntimeError(
                "gradients have already been unscaled by grad_scaler: after "
                "grad_scaler.step(optimizer), call grad_scaler.update() before the next backward()"
            )

    def _stage(self, optimizer: Optimizer) -> OptState | None:
        """What an enabled scaler has done with the optimizer since its update; None without one."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        states = self.scaler._per_optimizer_states
        if id(optimizer) not in states:  # a look would add an entry: the scaler could not be copied
            return OptState.READY
        stage: OptState = states[id(optimizer)]["stage"]
        return stage


class _InKernels:
    """A base optimizer whose step the kernels take.

    To a GradScaler it is an optimizer that supports AMP scaling: the scaler sets ``found_inf`` on
    the device and always calls ``step``, without waiting.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def step(self, backup: dict[Tensor, Tensor]) -> None:
        """Restore and update in one pass; where gradients are sparse, in the base's own step."""
        moving = [_moving(group, backup) for group in self.param_groups]
        if any(grad.layout is not torch.strided for _, _, grads in moving for grad in grads):
            self._by_base(backup)
            return
        without_grad = [p for p in backup if p.grad is None]
        ksam_kernels.restore_(without_grad, [backup[p] for p in without_grad])
        update = _sgd if isinstance(self.base, SGD) else _adam
        for group, lists in zip(self.param_groups, moving, strict=True):
            if lists[0]:
                update(self.base, group, *lists, self.found_inf)

    def _by_base(self, backup: dict[Tensor, Tensor]) -> None:
        """Restore, and take the step unless the scaler found that a gradient is not finite."""
        put_back(backup)
        if self.found_inf is None or not self.found_inf.item():
            self.base.step()


def _moving(
    group: dict[str, Any], backup: dict[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A group's parameters that have a gradient, their weights before the step, the gradients."""
    found = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
    params = [p for p, _ in found]
    return params, [backup.get(p, p) for p in params], [grad for _, grad in found]
