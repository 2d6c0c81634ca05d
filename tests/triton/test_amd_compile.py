"""Triton's kernels compile for AMD's GPUs, on which nobody ran them: vectors, no spills, IEEE."""

from __future__ import annotations

import re

import pytest
import torch

from ksam_kernels.loss import triton as loss
from ksam_kernels.loss import triton_elementwise as elementwise
from ksam_kernels.loss import triton_kernels as kernels
from ksam_kernels.topk import triton as topk
from tests.triton import test_compact_compile as compact_compile
from tests.triton import test_loss_compile as loss_compile
from tests.triton import test_perturb_compile as perturb_compile
from tests.triton import test_topk_compile as topk_compile
from tests.triton.compiled import AMD, Compiled

ON = pytest.mark.parametrize("architecture", AMD)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def check(made: Compiled, load: int = 16, store: int | None = None) -> None:
    assert made.spill_bytes == 0
    # Four warps a SIMD: of 64 threads they share 512 a lane, of 32 each has all that can be named.
    assert made.registers <= (128 if "wavefront_size: 64" in made.assembly else 256)
    assert made.widest("ld") >= load
    assert store is None or made.widest("st") >= store


def count(made: Compiled, instruction: str) -> int:
    return len(re.findall(rf"\bv_(?:dual_)?(?:{instruction})\w*_f32(?:_e\d+)?\b", made.assembly))


def check_trap(made: Compiled) -> None:
    """A check that fails makes a trap, which a branch leads around, and nothing else does. Unlike a
    message, it asks for no buffer of the host's."""
    assert "hostcall" not in made.assembly
    code = [line.split(";")[0].strip() for line in made.assembly.splitlines()]
    code = [line for line in code if line and not re.match(r"\.(?!LBB)", line)]
    (at,) = (i for i, line in enumerate(code) if line.startswith("s_trap"))
    branches = [i for i in range(at) if code[i].startswith(("s_cbranch", ".LBB"))]
    around = re.fullmatch(r"s_cbranch_\w+ (\.LBB\w+)", code[branches[-1]])
    assert around is not None, code[branches[-1] : at + 1]
    assert f"{around[1]}:" in code[at : at + 4]


@ON
@DTYPES
@pytest.mark.parametrize("name", perturb_compile.KERNELS)
def test_perturb(name: str, dtype: torch.dtype, architecture: str) -> None:
    made = perturb_compile.KERNELS[name](dtype, architecture)
    check(made, 16, None if "norm" in name else 16)
    # Exact: LLVM makes an IEEE division of five multiply-adds of one rounding, and a square root of
    # two or, from its reciprocal, of five. There are no others, and denormals are kept.
    expected = 5 * count(made, "div_fixup") + 2 * count(made, "sqrt") + 5 * count(made, "rsq")
    fused = count(made, "fma|mac|mad") + 2 * count(made, "pk_(?:fma|mac|mad)")
    assert fused == expected
    assert (expected > 0) == (name in ("perturb", "adaptive perturb", "sgd", "adam"))
    assert ".amdhsa_float_denorm_mode_32 3" in made.assembly


@ON
def test_the_norm_is_finished_by_as_many_warps_as_there_are(architecture: str) -> None:
    arguments = {"partials": "*fp64", "count": "i32", "wide": "*fp64", "norm": "*fp32"}
    block = perturb_compile.constants(BLOCK=perturb_compile.launches._FINISH_BLOCK)
    made = perturb_compile.build(
        perturb_compile.kernels.finish_norm_kernel,
        {**arguments, **block},
        architecture,
        1024 // AMD[architecture],
    )
    check(made, 8)


@ON
@DTYPES
@pytest.mark.parametrize("kind", loss_compile.TARGETS, ids=str)
def test_cross_entropy(kind: tuple[int, bool], dtype: torch.dtype, architecture: str) -> None:
    wide = dtype.itemsize * 4  # bytes of four logits
    for kernel, more in (
        (kernels.cross_entropy_kernel, {"LOOPS": True}),
        (kernels.cross_entropy_backward_kernel, {}),
    ):
        columns = 32000 if more else 1000
        tile = loss.tile_of(columns, loss.tile_for(torch.empty(0, dtype=dtype), kind[0] == 0))
        options = {**loss_compile.of(kind), **more}
        made = loss_compile.build(kernel, dtype, columns, architecture, tile, **options)
        check(made, wide, None if more else wide)
        if kind[0] != 2:
            check_trap(made)
        assert ("s_trap" in made.assembly) == (kind[0] != 2)


@ON
@DTYPES
@pytest.mark.parametrize("kind", loss_compile.TARGETS, ids=str)
def test_planes(kind: tuple[int, bool], dtype: torch.dtype, architecture: str) -> None:
    wide = dtype.itemsize * 4
    for kernel, more in (
        (kernels.cross_entropy_kernel, {"LOOPS": False}),
        (kernels.cross_entropy_backward_kernel, {}),
    ):
        size = loss.tile_for(torch.empty(0, dtype=dtype), kind[0] == 0)
        tile = loss.tile_of_planes(16384, 21, size)
        options = {"group": 16384, **loss_compile.of(kind), **more}
        made = loss_compile.build(kernel, dtype, 21, architecture, tile, **options)
        check(made, wide, None if more else wide)


@ON
@DTYPES
@pytest.mark.parametrize("binary", [False, True], ids=["mse", "bce"])
def test_means(binary: bool, dtype: torch.dtype, architecture: str) -> None:
    wide = dtype.itemsize * 4
    for kernel, store in (
        (elementwise.mean_kernel, None),
        (elementwise.mean_backward_kernel, wide),
    ):
        tile = loss.tile_of(32000, loss.tile_for(torch.empty(0, dtype=dtype), not binary))
        options = {"weighted": binary, "BINARY": binary}
        made = loss_compile.build(kernel, dtype, 32000, architecture, tile, **options)
        check(made, wide, store)


@ON
@pytest.mark.parametrize("losses", ["*fp32", "*fp64"])
def test_topk(losses: str, architecture: str) -> None:
    block = topk.ONE_PROGRAM * 32 // topk_compile.KEYS[losses][1]
    warps = 1024 // AMD[architecture]
    check(topk_compile.one_program(architecture, losses, block, warps), 4)
    assert topk.WARPS * AMD[architecture] <= 1024
    for made in topk_compile.many_programs(architecture, losses):
        check(made, 4)


@ON
def test_compact(architecture: str) -> None:
    made = compact_compile.gather(architecture)
    check(made, 16, 16)
    check_trap(made)
