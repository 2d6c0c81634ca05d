"""Arithmetic that the rooms' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double_of(bits):
    """The double that was passed as :func:`ksam_kernels.triton_support.double_bits`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def divide(a, b):
    """The IEEE quotient; of floats, Triton gives it by this name only."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)
