"""The kernels of the top-k room, compiled: what they take of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl

from ksam_kernels.topk import triton as topk
from ksam_kernels.triton_support import EXACT
from tests.triton.compiled import ARCHITECTURES, SPILL_BYTES, Compiled, compiled

KEYS = {"*fp32": (tl.int32, 32), "*bf16": (tl.int32, 32), "*fp16": (tl.int32, 32)}
KEYS["*fp64"] = (tl.int64, 64)
#: All dtypes for one architecture, a key of either size for the others.
BUILDS = [(90, losses) for losses in KEYS]
BUILDS += [(a, losses) for a in ARCHITECTURES if a != 90 for losses in ("*fp32", "*fp64")]
SCRATCH = {"states": "*i64", "counts": "*i64", "index": "i32"}
SHARE: dict[str, Any] = {"stride": "i64", "n": "i64", "k": "i64", "share": "i64", **SCRATCH}


def constants(losses: str, **more: object) -> dict[str, Any]:
    key, bits = KEYS[losses]
    values = {"KEY": key, "LOWEST": -(2 ** (bits - 1)), "BITS": bits, **more}
    return {name: ("constexpr", value) for name, value in values.items()}


def one_program(architecture: int | str, losses: str, block: int, warps: int) -> Compiled:
    more = constants(losses, BLOCK=block, STEP=min(block, topk.STEP))
    arguments = {"losses": losses, "stride": "i64", "n": "i32", "k": "i32", "out": "*i64", **more}
    aligned = ("losses", "out")
    return compiled(topk.select_kernel, arguments, architecture, aligned, num_warps=warps, **EXACT)


def many_programs(architecture: int | str, losses: str) -> list[Compiled]:
    """A digit, counts of what is selected, and their indices."""
    share = {"losses": losses, **SHARE}
    last = {**share, "selected": "*i64", "out": "*i64"}
    more = constants(losses, BLOCK=topk.BLOCK, MOST=topk.MOST_PROGRAMS)
    launches = [
        (topk.digit_kernel, {**share, **constants(losses, BLOCK=topk.BLOCK)}),
        (topk.select_share_kernel, {**last, "WRITES": ("constexpr", False), **more}),
        (topk.select_share_kernel, {**last, "WRITES": ("constexpr", True), **more}),
    ]
    aligned = ("losses", "states", "counts")
    return [
        compiled(kernel, arguments, architecture, aligned, num_warps=topk.WARPS, **EXACT)
        for kernel, arguments in launches
    ]


@pytest.mark.parametrize(("architecture", "losses"), BUILDS)
def test_one_program_keeps_its_keys_in_registers(architecture: int, losses: str) -> None:
    for block, warps in ((topk.ONE_PROGRAM, 32), (1024, 4)):
        block = min(block, topk.ONE_PROGRAM * 32 // KEYS[losses][1])
        kernel = one_program(architecture, losses, block, warps)
        assert kernel.spill_bytes <= SPILL_BYTES
        assert kernel.registers * 32 * warps <= 65536
        assert kernel.shared_bytes <= 1024


@pytest.mark.parametrize(("architecture", "losses"), BUILDS)
def test_many_programs(architecture: int, losses: str) -> None:
    for kernel in many_programs(architecture, losses):
        assert kernel.spill_bytes <= SPILL_BYTES
        assert kernel.registers <= 128
        assert kernel.shared_bytes <= 4096
