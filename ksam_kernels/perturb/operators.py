"""``torch.ops.ksam`` operators of the perturb room: schemas with their mutations, output shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ksam_kernels.library import operator


def _scalar(tensors: list[Tensor]) -> Tensor:
    """Memory for a norm, float32, on the device of the first tensor; on the CPU without one."""
    device = tensors[0].device if tensors else "cpu"
    return torch.empty((), dtype=torch.float32, device=device)


@operator("(Tensor[] grads, Tensor[] params, bool adaptive, float eta) -> Tensor")
def grad_norm(grads: list[Tensor], *_: Any) -> Tensor:
    return _scalar(grads)


@operator(
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backup, float[] rho, bool adaptive,"
    " float eta) -> Tensor"
)
def perturb_(params: list[Tensor], *_: Any) -> Tensor:
    return _scalar(params)


@operator("(Tensor(a!)[] params, Tensor[] backup) -> ()")
def restore_(*_: Any) -> None:
    return None


@operator(
    "(Tensor(a!)[] params, Tensor[] backup, Tensor[] grads, Tensor(b!)[] momentum_buffers,"
    " Tensor(c!)[] steps, float lr, float momentum, float dampening, float weight_decay,"
    " bool nesterov, bool maximize, Tensor? device_lr, Tensor? grad_scale, Tensor? found_inf)"
    " -> ()"
)
def restore_sgd_(*_: Any) -> None:
    return None


@operator(
    "(Tensor(a!)[] params, Tensor[] backup, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool maximize, bool decoupled_weight_decay, Tensor? device_lr,"
    " Tensor? grad_scale, Tensor? found_inf) -> ()"
)
def restore_adam_(*_: Any) -> None:
    return None
