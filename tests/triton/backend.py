"""The backend ``triton-interpreter``: the Triton kernels on CPU tensors. For tests only.

It says whether the kernels compute what the contracts ask: programs run one after another, so it
sees no race. For what it does otherwise than a GPU see tests/triton/gpu_like.py. ``auto`` never
picks it.
"""

from __future__ import annotations

from ksam_kernels import backends, triton_support
from tests.triton.interpreter import DEMANDED, NAME

#: Whether the kernels can be compiled in this run.
CAN_COMPILE = triton_support.MISSING is None and not DEMANDED

#: Why the backend is not there; None if it is.
MISSING = triton_support.MISSING or (
    None if DEMANDED else f"slow, and not demanded by KSAM_TEST_BACKENDS={NAME}"
)

if MISSING is None:
    from tests.triton import gpu_like

    gpu_like.install()
    for room in backends.OPERATORS:
        triton_support.register(room, backend=NAME, devices=("cpu",))
