"""Compiled kernels. Each returns False, and has written nothing, where it declines an argument."""

from torch import Tensor

compiler: str
cpu_isa: str

def topk_indices(losses: Tensor, out: Tensor) -> bool: ...
def compact(tensors: list[Tensor], indices: Tensor, out: list[Tensor]) -> bool: ...
