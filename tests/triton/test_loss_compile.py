"""The kernels of the loss room, compiled: what they take of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from ksam_kernels.loss import triton as loss
from ksam_kernels.loss import triton_elementwise as elementwise
from ksam_kernels.loss import triton_kernels as kernels
from ksam_kernels.triton_support import assertions
from tests.triton.compiled import ARCHITECTURES, SPILL_BYTES, Compiled, compiled

FLOATS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
}
#: All dtypes for one architecture, those of most training for the others.
BUILDS = [(90, dtype) for dtype in FLOATS]
BUILDS += [(a, dtype) for a in ARCHITECTURES if a != 90 for dtype in list(FLOATS)[:2]]
#: Kind of target, whether there are weights.
TARGETS = ((0, False), (1, True), (2, False), (2, True))


def of(kind: tuple[int, bool]) -> dict[str, Any]:
    """What :func:`build` is told of one of TARGETS."""
    return {"target": "*i64" if kind[0] != 2 else "", "weighted": kind[1], "KIND": kind[0]}


def build(
    kernel: Any,
    dtype: torch.dtype,
    columns: int,
    architecture: int | str,
    tile: tuple[int, int, int],
    *,
    target: str = "",
    weighted: bool = False,
    group: int = 0,
    **more: Any,
) -> Compiled:
    """A kernel as a launch with rows of `columns` has it, or with groups of them in planes."""
    name = "logits" if "logits" in kernel.arg_names else "input"
    like = torch.zeros(1, columns, max(group, 1), dtype=dtype).movedim(1, -1)
    weight = torch.zeros(columns) if weighted else None
    t = like if not target else torch.zeros(like.shape[:-1], dtype=torch.int64)
    layout = loss._planes(like, t) if group else loss._rows(name, like, t, columns)
    assert layout is not None
    known = {"PLANES": False, **loss._arguments(layout, dtype, weight, columns)}
    rows, block, warps = tile
    checks = assertions(amd=isinstance(architecture, str)) if name == "logits" else {}
    values = {**known, "ROWS": rows, "BLOCK": block, "TRAPS": checks.pop("TRAPS", None), **more}
    pointer = FLOATS[dtype]
    opmath = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {
        **{stride: "i64" for stride in kernel.arg_names if stride.endswith("_stride")},
        **dict.fromkeys(("rows", "group", "ignore_index", "confidence", "uniform"), "i64"),
        "columns": "i32",
        name: pointer,
        "target": target or pointer,
        "weight": "*fp32" if weighted else None,
        "losses": "*fp32",
        "grad": "*fp32",
        "stats": opmath,
        "out": pointer,
    }
    arguments = {
        argument: types[argument] if argument in types else ("constexpr", values[argument])
        for argument in kernel.arg_names
    }
    aligned = tuple(n for n in ("losses", "stats", "out", "grad") if n in arguments)
    options = {"num_warps": warps, **loss.OPTIONS, **checks}
    return compiled(kernel, arguments, architecture, aligned, **options)


def check(
    kernel: Compiled, dtype: torch.dtype, warps: int, stores: int | None = None, spilled: int = 0
) -> None:
    assert kernel.spill_bytes <= max(spilled, SPILL_BYTES)
    # At least two programs, or one of float64, fit a multiprocessor's 65,536 registers.
    programs = 1 if dtype == torch.float64 else 2
    assert kernel.registers * 32 * warps * programs <= 65536
    assert kernel.shared_bytes <= 8192
    assert kernel.widest("ld") == 16
    if stores is not None:
        assert kernel.widest("st") == stores


@pytest.mark.parametrize("kind", TARGETS, ids=str)
@pytest.mark.parametrize(("architecture", "dtype"), BUILDS, ids=str)
def test_cross_entropy(architecture: int | str, dtype: torch.dtype, kind: tuple[int, bool]) -> None:
    for columns in (1000, 32000):
        tile = loss.tile_of(columns, loss.tile_for(torch.empty(0, dtype=dtype), kind[0] == 0))
        more = {**of(kind), "LOOPS": columns > tile[1]}
        kernel = build(kernels.cross_entropy_kernel, dtype, columns, architecture, tile, **more)
        assert "__assertfail" in kernel.assembly or kind[0] == 2
        check(kernel, dtype, tile[2])


@pytest.mark.parametrize("kind", TARGETS, ids=str)
@pytest.mark.parametrize(("architecture", "dtype"), BUILDS, ids=str)
def test_cross_entropy_backward(
    architecture: int | str, dtype: torch.dtype, kind: tuple[int, bool]
) -> None:
    tile = loss.tile_of(1000, loss.tile_for(torch.empty(0, dtype=dtype), kind[0] == 0))
    kernel = kernels.cross_entropy_backward_kernel
    check(build(kernel, dtype, 1000, architecture, tile, **of(kind)), dtype, tile[2], 16)


@pytest.mark.parametrize("kind", TARGETS, ids=str)
@pytest.mark.parametrize(("architecture", "dtype"), BUILDS, ids=str)
def test_planes(architecture: int | str, dtype: torch.dtype, kind: tuple[int, bool]) -> None:
    """Vectors go along the rows there, as far as their number allows."""
    for columns, group in ((21, 16384), (150, 64)):
        tile = loss.tile_for(torch.empty(0, dtype=dtype), kind[0] == 0)
        tiles = loss.tile_of_planes(group, columns, tile)
        for kernel, more, stores in (
            (kernels.cross_entropy_kernel, {"LOOPS": columns > tiles[1]}, None),
            (kernels.cross_entropy_backward_kernel, {}, 16),
        ):
            options = {"group": group, **of(kind), **more}
            result = build(kernel, dtype, columns, architecture, tiles, **options)
            # For sm_80 ptxas has the last weighted ones one pair of registers below a step of 32.
            check(result, dtype, tiles[2], stores, 8 if architecture == 80 and kind[1] else 0)


@pytest.mark.parametrize("binary", [False, True], ids=["mse", "bce"])
@pytest.mark.parametrize(("architecture", "dtype"), BUILDS, ids=str)
def test_means(architecture: int | str, dtype: torch.dtype, binary: bool) -> None:
    for weighted in {False, binary}:
        for kernel, stores in (
            (elementwise.mean_kernel, None),
            (elementwise.mean_backward_kernel, 16),
        ):
            size = loss.tile_for(torch.empty(0, dtype=dtype), not binary)
            tile = loss.tile_of(size if stores else 32000, size)
            options = {"weighted": weighted, "BINARY": binary}
            result = build(kernel, dtype, 32000, architecture, tile, **options)
            check(result, dtype, tile[2], stores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_without_alignment(architecture: int | str) -> None:
    """With an odd number of columns they are read element by element."""
    columns, tile = 50257, loss.tile_of(50257, loss.TILE)
    more = {**of((0, False)), "LOOPS": True}
    kernel = build(kernels.cross_entropy_kernel, torch.float32, columns, architecture, tile, **more)
    assert kernel.spill_bytes <= SPILL_BYTES
    assert kernel.widest("ld") == 8  # the class


KERNELS = [
    (kernels.cross_entropy_kernel, {**of((1, True)), "LOOPS": True}),
    (kernels.cross_entropy_backward_kernel, of((1, True))),
    (elementwise.mean_kernel, {"BINARY": True}),
    (elementwise.mean_backward_kernel, {"BINARY": True}),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "more"), KERNELS, ids=lambda case: getattr(case, "__name__", "")
)
def test_an_index_of_64_bits(kernel: Any, more: dict[str, Any], dtype: torch.dtype) -> None:
    tile = loss.tile_of(loss.SMALL_TILE, loss.SMALL_TILE)
    options: dict[str, Any] = {"weighted": True, **more, "INDEX": tl.int64}
    check(build(kernel, dtype, 32000, 90, tile, **options), dtype, tile[2])


def test_32_bits_count_a_loop_to_its_end() -> None:
    """The end is a block after the last column at most."""
    longest = 2**31 - 1 - 2 * loss.TILE
    assert loss.index_of(longest) == tl.int32
    assert loss.index_of(longest + 1) == tl.int64
    assert (
        max(loss.tile_of(longest, tile)[1] for tile in (loss.TILE, loss.SMALL_TILE))
        <= 2 * loss.TILE
    )
