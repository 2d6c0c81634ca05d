"""Top-k: indices of the k largest losses."""

from ksam_kernels.topk import native as native
from ksam_kernels.topk import operators as operators
from ksam_kernels.topk import reference as reference
from ksam_kernels.topk.functional import topk_indices
from ksam_kernels.triton_support import register

register("topk")

__all__ = ["topk_indices"]
