"""Whether Triton can compile here, found out by compiling.

It needs a C compiler, the driver's library and an architecture that it knows, and says that one is
missing only when a kernel is to be launched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ksam_kernels.triton_support import EXACT


@triton.jit
def _zero_kernel(out):
    tl.store(out, 0)


def compile_for_current_device() -> None:
    """Raise what a launch would. Nothing is launched or loaded and no device memory is taken, so a
    CUDA graph may be captured meanwhile."""
    _zero_kernel.warmup(torch.int32, grid=(1,), **EXACT)
