"""Triton, where this installation has it, and what the rooms' Triton kernels share.

``<room>/triton.py`` holds a room's kernels, and functions named as the operators that launch them.
It is imported by the first call of one of these: Triton takes a third of a second to import, which
those who stay on the CPU need not wait for.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ksam_kernels import backends

__all__ = ["EXACT", "MISSING", "double_bits", "on_device_of", "register"]

#: Why there are no Triton kernels here; None if there are. Torch from 2.11 on comes with a Triton
#: that is new enough, where it comes with one.
MISSING = (
    "this installation has no Triton: pip install triton" if find_spec("triton") is None else None
)

if MISSING is not None:
    backends.explain("triton", MISSING)

#: Launch options of kernels whose contract is exact: a product and a sum are two roundings. Triton
#: 3.6 to 3.9 would contract them, later versions not; say it always.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def register(
    room: str, *operators: str, backend: str = "triton", devices: tuple[str, ...] = ("cuda",)
) -> None:
    """Make functions of ``ksam_kernels.<room>.triton`` a backend's implementations, if Triton is
    there."""
    if MISSING is not None:
        return

    def launcher(operator: str) -> Any:
        def launch(*args: Any) -> Any:
            return getattr(import_module(f"ksam_kernels.{room}.triton"), operator)(*args)

        return launch

    for operator in operators:
        backends.implements(backend, operator, devices=devices)(launcher(operator))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """For launches where the tensor is: Triton takes the *current* device and its stream."""
    if tensor.device.type != "cuda":
        return nullcontext()  # the interpreter
    return torch.cuda.device(tensor.device)


def double_bits(value: float) -> int:
    """A float64 argument for a kernel, which reads it with ``x.to(tl.int64).to(tl.float64,
    bitcast=True)``: as a float it would arrive rounded to float32. Annotate the parameter as
    ``tl.int64`` and list it in ``do_not_specialize``, or every new value compiles the kernel anew.
    """
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
