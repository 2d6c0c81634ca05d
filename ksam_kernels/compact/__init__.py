"""Compact: gather the chosen rows of every tensor of a batch."""

from ksam_kernels.compact import native as native
from ksam_kernels.compact import operators as operators
from ksam_kernels.compact import reference as reference
from ksam_kernels.compact.functional import compact_batch
from ksam_kernels.compact.tree import batch_size
from ksam_kernels.triton_support import register

register("compact")

__all__ = ["batch_size", "compact_batch"]
