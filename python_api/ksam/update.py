"""Restore the weights and update them: fused with torch's own SGD, Adam and AdamW, else in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

import ksam_kernels
from ksam_kernels.checks import FLOATING

_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")


def _plain(base: Optimizer) -> bool:
    """Nobody hangs on ``base.step`` itself: no hook, and no scheduler that wrapped it."""
    return (
        "step" not in vars(base)
        and not base._optimizer_step_pre_hooks
        and not base._optimizer_step_post_hooks
    )


def _fusable(group: dict[str, Any]) -> bool:
    return not (
        group["foreach"]
        or group["fused"]
        or group["differentiable"]
        or group.get("amsgrad")
        or isinstance(group["lr"], Tensor)
        or any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
    )


def can_fuse(base: Optimizer) -> bool:
    """Exactly ``torch.optim.SGD``, ``Adam`` or ``AdamW``, with options that the kernels have."""
    if type(base) not in (SGD, Adam, AdamW) or not _plain(base):
        return False
    return all(_fusable(group) for group in base.param_groups) and all(
        p.dtype in FLOATING for group in base.param_groups for p in group["params"]
    )


def _step_counter(param: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """torch keeps Adam's step on the CPU unless told otherwise; the kernels count on the device.

    Filled there: a number copied to a GPU, as torch.tensor(value, device=...) does, waits for it.
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
        elif counts and "step" not in state:  # torch's own SGD counts none: the buffer is history
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
        **{name: group[name] for name in _SGD_OPTIONS},
    )


def _adam(
    base: Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    backup: list[Tensor],
    grads: list[Tensor],
) -> None:
    for p in params:
        state = base.state[p]
        if not state:
            state["step"] = _step_counter(p)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] = _step_counter(p, state["step"])
    states = [base.state[p] for p in params]
    ksam_kernels.restore_adam_(
        params,
        backup,
        grads,
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
        **{name: group[name] for name in _ADAM_OPTIONS},
        decoupled_weight_decay=isinstance(base, AdamW) or group["decoupled_weight_decay"],
    )


def restore_and_update(base: Optimizer, backup: dict[Tensor, Tensor]) -> None:
    """The backed-up weights put back and the base optimizer's step taken with ``.grad``.

    Args:
        backup: perturbed parameter -> its weights before the perturbation.
    """
    if not can_fuse(base):
        ksam_kernels.restore_(list(backup), list(backup.values()))
        base.step()
        return
    without_grad = [p for p in backup if p.grad is None]
    ksam_kernels.restore_(without_grad, [backup[p] for p in without_grad])
    update = _sgd if isinstance(base, SGD) else _adam
    for group in base.param_groups:
        moving = [(p, backup.get(p, p), p.grad) for p in group["params"] if p.grad is not None]
        if moving:
            params, backups, grads = map(list, zip(*moving, strict=True))
            update(base, group, params, backups, grads)
