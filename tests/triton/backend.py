"""The backend ``triton-interpreter``: the Triton kernels on CPU tensors. For tests only.

It says whether the kernels compute what the contracts ask: programs run one after another, so it
sees no race. Conversions to and from bfloat16 are tests/triton/bfloat16.py's. ``auto`` never picks
it.
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
    from tests.triton import bfloat16

    bfloat16.install()
    for room, operators in backends.OPERATORS.items():
        ours = [name for name in operators if name in backends._kernels["triton"]]
        triton_support.register(room, *ours, backend=NAME, devices=("cpu",))
