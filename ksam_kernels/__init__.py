"""Fused kernels for a K-SAM step: per-sample loss, top-k, batch compaction, perturb and restore.

Every function here dispatches to the best backend for the tensors' device; ``python -m
ksam_kernels`` prints which one that is and why. The same operations are registered with PyTorch as
``torch.ops.ksam.*``.
"""

from ksam_kernels.backends import BackendUnavailableError, requested_backend, use_backend
from ksam_kernels.compact import batch_size, compact_batch
from ksam_kernels.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse,
    select_cross_entropy,
)
from ksam_kernels.perturb import grad_norm, perturb_, restore_, restore_adam_, restore_sgd_
from ksam_kernels.topk import topk_indices

__all__ = [
    "BackendUnavailableError",
    "batch_size",
    "binary_cross_entropy_with_logits",
    "compact_batch",
    "cross_entropy",
    "grad_norm",
    "mse",
    "perturb_",
    "requested_backend",
    "restore_",
    "restore_adam_",
    "restore_sgd_",
    "select_cross_entropy",
    "topk_indices",
    "use_backend",
]
