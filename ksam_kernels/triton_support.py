"""Triton, where this installation has it, and what the rooms' Triton kernels share.

``<room>/triton.py`` holds functions that are named like the room's operators and launch its
kernels; the kernels are there too, or in the ``triton_*.py`` beside it. The file is imported by the
first call of one of these functions: Triton takes a third of a second to import, which those who
stay on the CPU need not wait for.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ksam_kernels import backends

__all__ = [
    "EXACT",
    "MISSING",
    "assertions",
    "device_ints",
    "double_bits",
    "doubles_bits",
    "is_amd",
    "may_cache_on",
    "most_warps",
    "on_device_of",
    "register",
    "stream_of",
    "upload",
]


def _missing() -> str | None:
    if find_spec("triton") is not None:
        return None
    if torch.version.hip is not None:  # whose Triton has another name, and the same files
        return "this installation has no Triton: install torch for ROCm with its dependencies"
    return "this installation has no Triton: pip install triton"


#: Why there are no Triton kernels here; None if there are. Torch from 2.11 on comes with a Triton
#: that is new enough, where it comes with one.
MISSING = _missing()

if MISSING is not None:
    backends.set_missing_reason("triton", MISSING)


@lru_cache(maxsize=64)  # devices
def _cannot_compile_for(device: torch.device) -> str | None:
    try:
        with torch.cuda.device(device):
            import_module("ksam_kernels.triton_probe").compile_for_current_device()
    except Exception as error:  # Triton's, a compiler's, a driver's: anything
        first_line = str(error).partition("\n")[0]
        return f"Triton cannot compile for {device}: {type(error).__name__}: {first_line}"
    return None


def _cannot_compile(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a GPU, where it is installed and yet cannot compile."""
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _cannot_compile_for(device)


backends.register_obstacle("triton", _cannot_compile)

#: Launch options of kernels whose contract is exact: a product and a sum are two roundings. Triton
#: 3.6 to 3.9 would contract them, later versions not, and 3.9 warns of it: so every launch says it.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def register(room: str, *, backend: str = "triton", devices: tuple[str, ...] = ("cuda",)) -> None:
    """Make the functions of ``ksam_kernels.<room>.triton`` that are named as operators a backend's
    implementations, if Triton is there."""
    if MISSING is not None:
        return

    def launcher(operator: str) -> Any:
        def launch(*args: Any) -> Any:
            return getattr(import_module(f"ksam_kernels.{room}.triton"), operator)(*args)

        return launch

    for operator in backends.OPERATORS[room]:
        backends.implements(backend, operator, devices=devices)(launcher(operator))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context of launches on the tensor's device: Triton takes the *current* one and its stream."""
    if tensor.device.type != "cuda":
        return nullcontext()  # the interpreter
    return torch.cuda.device(tensor.device)


def is_amd(device: torch.device) -> bool:
    """Whether kernels for the device are compiled for AMD; interpreted ones are not."""
    return device.type == "cuda" and torch.version.hip is not None


def assertions(*, amd: bool) -> dict[str, Any]:
    """Constant and options for launches of kernels that call ``triton_assert.check``. Without
    ``debug`` Triton leaves assertions out; with it, it would also check integer arithmetic."""
    return {"TRAPS": amd, "debug": not amd, "sanitize_overflow": False}


def double_bits(value: float) -> int:
    """A float64 argument for a kernel, which reads it with ``x.to(tl.int64).to(tl.float64,
    bitcast=True)``: as a float it would arrive rounded to float32. Annotate the parameter as
    ``tl.int64`` and list it in ``do_not_specialize``, or every new value compiles the kernel anew.
    """
    return doubles_bits([value])[0]


def doubles_bits(values: Sequence[float]) -> list[int]:
    """:func:`double_bits` of each."""
    return list(struct.unpack(f"<{len(values)}q", struct.pack(f"<{len(values)}d", *values)))


@lru_cache(maxsize=64)  # devices
def most_warps(device: torch.device) -> int:
    """The most warps of a program: it has up to 1,024 threads, a warp 32, on some AMD GPUs 64."""
    if device.type != "cuda":
        return 32  # the interpreter
    return 1024 // torch.cuda.get_device_properties(device).warp_size


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def may_cache_on(device: torch.device) -> bool:
    """Whether memory of the device that is allocated now may be cached for later calls. Not in a
    capture: a graph keeps no memory but its own."""
    return backends.may_cache() and not is_capturing(device)


def stream_of(device: torch.device) -> int:
    """A number for the stream that launches go to."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def upload(values: array[int], device: torch.device) -> Tensor:
    """int64 [len(values)] in new memory of the device, without waiting for it.

    While a graph is captured, the values are passed as arguments of kernels, which are part of the
    graph, and so is the memory: a replay of a copy would read host memory that is long freed.
    """
    if is_capturing(device):
        return _by_value(values, device)
    if not values:  # of which frombuffer makes no tensor
        return torch.empty(0, dtype=torch.int64, device=device)
    # From the array's memory: a list of ints would take torch a hundred times as long.
    host = torch.frombuffer(values, dtype=torch.int64)
    if device.type != "cuda":
        return host.clone()
    # The allocator of pinned memory knows of the copy, and reuses the memory only after it.
    return host.pin_memory().to(device, non_blocking=True)


def _by_value(values: array[int], device: torch.device) -> Tensor:
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    if values:
        torch._foreach_add_(list(table.unbind()), values.tolist())
    return table


@lru_cache(maxsize=64)  # of what a step needs, some kilobytes each
def _kept(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return upload(array("q", values), device)


def device_ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    """:func:`upload`, which the next calls with the same values need not repeat.

    Only on the same stream: neither the upload nor the reuse of a forgotten table's memory is
    ordered with other streams.
    """
    if not may_cache_on(device):
        return upload(array("q", values), device)
    return _kept(values, device, stream_of(device))
