"""Loss: the loss of every sample from its logits."""

from ksam_kernels.loss import native as native
from ksam_kernels.loss import operators as operators
from ksam_kernels.loss import reference as reference
from ksam_kernels.loss.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse,
    select_cross_entropy,
)
from ksam_kernels.triton_support import register

register("loss")

__all__ = ["binary_cross_entropy_with_logits", "cross_entropy", "mse", "select_cross_entropy"]
