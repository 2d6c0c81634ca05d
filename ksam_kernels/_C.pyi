"""Compiled kernels. Those of the loss, top-k and compact rooms make what they return; they return
None where they decline an argument. The others write into what they are given and return True;
where they decline they have written nothing and return False."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

TensorList = Sequence[Tensor]

compiler: str
cpu_isa: str
cuda_architectures: str  # "80 90+PTX", or "" without CUDA kernels
sanitized: bool

def has_code_for(device: int) -> bool: ...  # these two only in builds with CUDA kernels
def why_no_code(device: int) -> str: ...
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor | None] | None: ...
def select_cross_entropy(
    logits: Tensor,
    target: Tensor,
    k: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor] | None: ...
def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor | None: ...
def binary_cross_entropy_with_logits(
    logits: Tensor, target: Tensor, pos_weight: Tensor | None
) -> Tensor | None: ...
def binary_cross_entropy_with_logits_backward(
    grad: Tensor, logits: Tensor, target: Tensor, pos_weight: Tensor | None
) -> Tensor | None: ...
def mse(pred: Tensor, target: Tensor) -> Tensor | None: ...
def mse_backward(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor | None: ...
def topk_indices(losses: Tensor, k: int) -> Tensor | None: ...
def compact(batch: Any, indices: Tensor, empty_rows: Callable[[Tensor, int], Tensor]) -> Any: ...
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
    device_lr: Tensor | None,
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
    device_lr: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool: ...

# Inspect lists of plain tensors on any device; False or None also where they have not looked.
# `written` and `alike` are positions of lists.
def on_one_device(lists: Sequence[TensorList]) -> bool: ...
def fits(
    lists: Sequence[TensorList],
    written: tuple[int, ...],
    alike: tuple[int, ...],
    counters: TensorList,
) -> bool: ...
def describe(
    lists: Sequence[TensorList], values: list[int] | None, chunk: int
) -> list[tuple[tuple[int, ...], bytes]] | None: ...
