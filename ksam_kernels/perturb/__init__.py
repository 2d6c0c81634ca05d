"""Perturb: move weights uphill with a backup, bring them back, update them."""

from ksam_kernels.perturb import native as native
from ksam_kernels.perturb import operators as operators
from ksam_kernels.perturb import reference as reference
from ksam_kernels.perturb.functional import (
    grad_norm,
    perturb_,
    restore_,
    restore_adam_,
    restore_sgd_,
)
from ksam_kernels.triton_support import register

register("perturb")

__all__ = ["grad_norm", "perturb_", "restore_", "restore_adam_", "restore_sgd_"]
