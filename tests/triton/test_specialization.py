"""Triton compiles a kernel anew for what it specializes on: no hyperparameter, size or offset."""

from __future__ import annotations

from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from ksam_kernels.compact.triton_kernels import gather_kernel
from ksam_kernels.perturb import triton_kernels as perturb

KERNELS = [
    gather_kernel,
    perturb.norm_kernel,
    perturb.finish_norm_kernel,
    perturb.perturb_kernel,
    perturb.restore_sgd_kernel,
    perturb.restore_adam_kernel,
    perturb.count_steps_kernel,
]


def specialization(kernel: Any, value: int) -> Any:
    """What a launch looks its compiled kernel up by, with one value for every number."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    # Tensors and constants stand for themselves: None takes the place of both.
    numbers = {p.name: value if p.annotation_type else None for p in kernel.params}
    return bind(**numbers)[1]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_values_do_not_compile_kernels_anew(kernel: Any) -> None:
    assert any(p.annotation_type for p in kernel.params)
    first = specialization(kernel, 0)
    for value in (1, 16, -3, 2**31, 2**62):
        assert specialization(kernel, value) == first
