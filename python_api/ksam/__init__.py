"""K-SAM: sharpness-aware minimization on the k highest-loss samples of each batch."""

from ksam.optimizer import KSAM, StepResult
from ksam.selection import cross_entropy
from ksam_kernels import binary_cross_entropy_with_logits, mse

__all__ = ["KSAM", "StepResult", "binary_cross_entropy_with_logits", "cross_entropy", "mse"]
