"""The compact kernel compiles for GPUs that are not here: vectors of 16 bytes, its assertion."""

from __future__ import annotations

import re

import pytest

from ksam_kernels.compact import triton as launches
from ksam_kernels.compact.triton_kernels import gather_kernel
from ksam_kernels.triton_support import EXACT, assertions
from tests.triton.compiled import ARCHITECTURES, Compiled, compiled

ON = pytest.mark.parametrize("architecture", ARCHITECTURES)


def gather(architecture: int | str, index: str = "*i64", leaves: int = launches.LEAVES) -> Compiled:
    checks = assertions(amd=isinstance(architecture, str))
    arguments = {
        "table": "*i64",
        "indices": index,
        "index_stride": "i64",
        "k": "i64",
        "LEAVES": ("constexpr", leaves),
        "TILE": ("constexpr", launches.TILE),
        "TRAPS": ("constexpr", checks.pop("TRAPS")),
    }
    options = {"num_warps": launches.WARPS, **EXACT, **checks}
    return compiled(gather_kernel, arguments, architecture, ("table",), **options)


@ON
@pytest.mark.parametrize("index", ["*i64", "*i32"])
def test_rows_move_in_vectors_and_nothing_spills(architecture: int | str, index: str) -> None:
    made = gather(architecture, index)
    assert made.widest("ld") == 16
    assert made.widest("st") == 16
    assert made.spill_bytes == 0
    assert made.registers <= 64  # four blocks of 256 threads on a multiprocessor
    assert made.shared_bytes <= 16 * 1024


@ON
def test_the_only_assertion_is_that_of_the_indices(architecture: int | str) -> None:
    """Integer arithmetic is not checked, though Triton would check it where it asserts."""
    assert len(re.findall(r"\bcall[\w.]*\s+__assertfail\b", gather(architecture).assembly)) == 1


def test_more_leaves_than_usual() -> None:
    assert gather(90, leaves=8 * launches.LEAVES).spill_bytes == 0
