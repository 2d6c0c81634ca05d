"""Compiled kernels. Each returns False, and has written nothing, where it declines an argument."""

from collections.abc import Sequence

from torch import Tensor

TensorList = Sequence[Tensor]

compiler: str
cpu_isa: str
sanitized: bool

def topk_indices(losses: Tensor, out: Tensor) -> bool: ...
def compact(tensors: TensorList, indices: Tensor, out: TensorList) -> bool: ...
def grad_norm(
    grads: TensorList, params: TensorList, adaptive: bool, eta: float, out: Tensor
) -> bool: ...
def perturb_(
    params: TensorList,
    grads: TensorList,
    backup: TensorList,
    rho: float | list[float],
    adaptive: bool,
    eta: float,
    out: Tensor,
) -> bool: ...
def restore_(params: TensorList, backup: TensorList) -> bool: ...
def restore_sgd_(
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    steps: TensorList,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool: ...
def restore_adam_(
    params: TensorList,
    backup: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    decoupled_weight_decay: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool: ...
