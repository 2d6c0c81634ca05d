"""Triton compiles a kernel anew for what it specializes on: no hyperparameter, size or offset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from ksam_kernels.compact.triton_kernels import gather_kernel
from ksam_kernels.loss import triton_elementwise as elementwise
from ksam_kernels.loss import triton_kernels as loss
from ksam_kernels.perturb import triton_kernels as perturb
from ksam_kernels.perturb import triton_updates as updates
from ksam_kernels.topk import triton as topk

KERNELS = [
    gather_kernel,
    perturb.norm_kernel,
    perturb.finish_norm_kernel,
    perturb.perturb_kernel,
    updates.restore_sgd_kernel,
    updates.restore_adam_kernel,
    updates.count_steps_kernel,
    topk.select_kernel,
    topk.digit_kernel,
    topk.select_share_kernel,
    loss.cross_entropy_kernel,
    loss.cross_entropy_backward_kernel,
    elementwise.mean_kernel,
    elementwise.mean_backward_kernel,
]
#: Those whose sums are to have the same bits wherever the tensors lie.
SUMS = [loss.cross_entropy_kernel, elementwise.mean_kernel]


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


@pytest.mark.parametrize("kernel", SUMS, ids=lambda kernel: kernel.__name__)
def test_addresses_do_not_compile_sums_anew(kernel: Any) -> None:
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    memory = torch.empty(64)
    for name in ("logits", "input", "target", "weight"):
        if name in kernel.arg_names:
            found = [
                bind(**{**dict.fromkeys(kernel.arg_names), name: memory[at:], "columns": columns})
                for at, columns in ((0, 16), (1, 16), (0, 1), (3, 3))
            ]
            assert all(other[1] == found[0][1] for other in found)
