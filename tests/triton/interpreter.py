"""Whether this run demands Triton's interpreter; import it before anything of ``ksam_kernels``.

``KSAM_TEST_BACKENDS=triton-interpreter`` runs the contract tests on CPU tensors by the Triton
kernels, each in Triton's interpreter: numpy, 1 to 4 ms a program. Triton decides for the
interpreter when a kernel is defined, so kernels of such a run cannot be compiled: compile tests
have runs without it.
"""

from __future__ import annotations

import os

NAME = "triton-interpreter"

DEMANDED = NAME in os.environ.get("KSAM_TEST_BACKENDS", "").split(",")

if DEMANDED:
    os.environ["TRITON_INTERPRET"] = "1"
