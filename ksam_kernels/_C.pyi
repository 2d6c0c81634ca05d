"""Compiled kernels. Each returns False, and has written nothing, where it declines an argument."""

from torch import Tensor

compiler: str
cpu_isa: str

def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    losses: Tensor,
    stats: Tensor,
) -> bool: ...
def select_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    losses: Tensor,
    stats: Tensor,
    indices: Tensor,
) -> bool: ...
def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    out: Tensor,
) -> bool: ...
def binary_cross_entropy_with_logits(
    logits: Tensor, target: Tensor, pos_weight: Tensor | None, losses: Tensor
) -> bool: ...
def binary_cross_entropy_with_logits_backward(
    grad: Tensor, logits: Tensor, target: Tensor, pos_weight: Tensor | None, out: Tensor
) -> bool: ...
def mse(pred: Tensor, target: Tensor, losses: Tensor) -> bool: ...
def mse_backward(grad: Tensor, pred: Tensor, target: Tensor, out: Tensor) -> bool: ...
def topk_indices(losses: Tensor, out: Tensor) -> bool: ...
