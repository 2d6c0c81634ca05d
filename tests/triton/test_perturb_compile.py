"""The perturb kernels compile for GPUs that are not here: vectors of 16 bytes, no spills, IEEE."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl

from ksam_kernels.perturb import triton as launches
from ksam_kernels.perturb import triton_kernels as kernels
from ksam_kernels.perturb import triton_updates as updates
from ksam_kernels.perturb.triton_table import CHUNK, HEAD
from ksam_kernels.triton_support import EXACT
from tests.triton.compiled import ARCHITECTURES, Compiled, compiled

TABLE = {"records": "*i64", "chunk_rows": "*i32"}
SCALARS = dict.fromkeys(("device_lr", "grad_scale", "found_inf"), "*fp32")
DOUBLES = ("lr", "log2_beta1", "log2_beta2", "beta1", "rest1", "beta2", "rest2", "eps", "decay")


def constants(**values: Any) -> dict[str, Any]:
    return {name: ("constexpr", value) for name, value in values.items()}


def types(dtype: torch.dtype, *names: str) -> dict[str, Any]:
    return constants(**launches._types((dtype,) * len(names), *names))


def build(
    kernel: Any, arguments: dict[str, Any], architecture: int | str, warps: int = launches._WARPS
) -> Compiled:
    aligned = tuple(name for name in arguments if name in ("records", "chunk_rows", "partials"))
    return compiled(kernel, arguments, architecture, aligned, num_warps=warps, **EXACT)


def norm(dtype: torch.dtype, architecture: int | str, adaptive: bool = False) -> Compiled:
    kind = launches._TYPES[dtype]
    more = constants(G=kind, P=kind, ADAPTIVE=adaptive, CHUNK=CHUNK)
    arguments = {**TABLE, "partials": "*fp64", "first": "i64", "eta": "i64", **more}
    return build(kernels.norm_kernel, arguments, architecture)


def perturb(dtype: torch.dtype, architecture: int | str, adaptive: bool = False) -> Compiled:
    more = {**types(dtype, "P", "G"), **constants(ADAPTIVE=adaptive, CHUNK=CHUNK)}
    arguments = {**TABLE, "norm": "*fp32", "wide": "*fp64", "eta": "i64", **more}
    return build(kernels.perturb_kernel, arguments, architecture)


def restore(dtype: torch.dtype, architecture: int | str) -> Compiled:
    more = constants(BITS=launches._BITS[dtype.itemsize], CHUNK=CHUNK)
    return build(kernels.restore_kernel, {**TABLE, **more}, architecture)


def sgd(dtype: torch.dtype, architecture: int | str, scalars: bool = True) -> Compiled:
    flags = dict.fromkeys(("MOMENTUM", "NESTEROV", "MAXIMIZE", "DECAYS", "COUNTED"), True)
    kinds = types(dtype, "P", "G", "V")
    arguments = {
        **TABLE,
        **(SCALARS if scalars else dict.fromkeys(SCALARS)),
        **dict.fromkeys(("lr", "momentum", "undampened", "decay"), "i64"),
        **{name: kinds[name] for name in ("P", "G", "V", "A", "BITS")},
        **constants(**flags, CHUNK=CHUNK),
    }
    return build(updates.restore_sgd_kernel, arguments, architecture)


def adam(dtype: torch.dtype, architecture: int | str, scalars: bool = True) -> Compiled:
    flags = dict.fromkeys(("NEAR", "MAXIMIZE", "DECAYS", "DECOUPLED"), True)
    kinds = types(dtype, "P", "G", "M", "V")
    arguments = {
        **TABLE,
        **(SCALARS if scalars else dict.fromkeys(SCALARS)),
        **dict.fromkeys(DOUBLES, "i64"),
        **{name: kinds[name] for name in ("P", "G", "M", "V", "A", "BITS")},
        **constants(**flags, CHUNK=CHUNK),
    }
    return build(updates.restore_adam_kernel, arguments, architecture)


KERNELS: dict[str, Callable[..., Compiled]] = {
    "norm": norm,
    "adaptive norm": partial(norm, adaptive=True),
    "perturb": perturb,
    "adaptive perturb": partial(perturb, adaptive=True),
    "restore": restore,
    "sgd": sgd,
    "adam": adam,
}
BUILDS = pytest.mark.parametrize("name", KERNELS)
ON = pytest.mark.parametrize("architecture", ARCHITECTURES)


@BUILDS
@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_chunks_move_in_vectors_and_nothing_spills(
    name: str, architecture: int | str, dtype: torch.dtype
) -> None:
    made = KERNELS[name](dtype, architecture)
    assert made.widest("ld") == 16
    if "norm" not in name:  # which stores one double
        assert made.widest("st") == 16
    assert made.spill_bytes == 0
    assert made.registers <= 128  # two blocks of 256 threads on a multiprocessor
    assert made.shared_bytes <= 2 * CHUNK  # for the layouts of chunks that are not full
    # Exact: no product is contracted with a sum, nothing flushes denormals or approximates. In
    # Adam the powers are in double; there the sum of squares may not be contracted either.
    floats = r"\b(fma|mad)\.[\w.]*f32|\bdiv\.(full|approx)|\bsqrt\.approx|\bex2|(add|mul|sub)\.ftz"
    assert re.findall(floats, made.assembly) == []
    if name != "adam":
        assert "fma.rn.f64" not in made.assembly


@BUILDS
def test_float64_fits_without_spills(name: str) -> None:
    made = KERNELS[name](torch.float64, 90)
    assert made.widest("ld") == 16
    assert made.spill_bytes == 0
    assert made.registers <= 255


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_without_scalars_on_the_device(name: str) -> None:
    made = KERNELS[name](torch.float32, 90, scalars=False)
    assert made.widest("st") == 16
    assert made.spill_bytes == 0


@ON
def test_single_program_and_step_kernels(architecture: int | str) -> None:
    arguments = {"partials": "*fp64", "count": "i32", "wide": "*fp64", "norm": "*fp32"}
    block = constants(BLOCK=launches._FINISH_BLOCK)
    warps = 32  # most_warps() of an NVIDIA GPU
    made = build(kernels.finish_norm_kernel, {**arguments, **block}, architecture, warps)
    assert made.spill_bytes == 0
    assert made.registers <= 64  # 1,024 threads
    assert "sqrt.rn.f64" in made.assembly
    steps = {"steps": "*i64", "count": "i32", "found_inf": "*fp32"}
    block = constants(BLOCK=launches._STEPS_BLOCK)
    assert build(updates.count_steps_kernel, {**steps, **block}, architecture, 4).spill_bytes == 0


def test_the_constants_of_tables_and_kernels_agree() -> None:
    assert kernels._HEAD == HEAD
    assert CHUNK == 16 * 32 * launches._WARPS
    assert torch.finfo(torch.float32).smallest_normal == kernels._SMALLEST
    assert set(launches._TYPES.values()) == {tl.float32, tl.bfloat16, tl.float16, tl.float64}
