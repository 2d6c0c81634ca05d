"""Triton kernels compiled without a GPU, and what the result takes of one.

``compiled(kernel, arguments, architecture)`` gives the assembly (PTX, AMD's) and, by the account of
ptxas or LLVM, registers, spills and shared memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
#: MI200, MI300, MI350, Radeon RX 7000, RX 9000; threads of a warp.
AMD = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

#: The most that a kernel has on the stack for want of registers: none from Triton 3.9 on. Before,
#: what it was with the last 3.6 (24) and the last 3.8 (64: topk.select_kernel of bfloat16, sm_90).
SPILL_BYTES = 0 if _VERSION >= (3, 9) else 64 if _VERSION >= (3, 7) else 24

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


#: Bytes of a lane, by the ends of the names of AMD's instructions.
_AMD_BYTES = {
    "ubyte": 1,
    "byte": 1,
    "u8": 1,
    "b8": 1,
    "ushort": 2,
    "short": 2,
    "u16": 2,
    "b16": 2,
    "dword": 4,
    "b32": 4,
    "dwordx2": 8,
    "b64": 8,
    "dwordx3": 12,
    "b96": 12,
    "dwordx4": 16,
    "b128": 16,
}


@dataclass(frozen=True)
class Compiled:
    assembly: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    def widest(self, op: str) -> int:
        """Bytes of the widest global ``ld`` or ``st``."""
        ptx = rf"\b{op}\.global((?:\.\w+)*?)(?:\.v(\d))?\.[a-z](\d+)\b"
        sizes = [int(n or 1) * int(size) // 8 for _, n, size in re.findall(ptx, self.assembly)]
        name = {"ld": "load", "st": "store"}[op]
        amd = rf"\b(?:global|buffer|flat)_{name}(?:_d16)?(?:_hi)?_(\w+)"
        sizes += [_AMD_BYTES[end] for end in re.findall(amd, self.assembly)]
        return max(sizes, default=0)


def _resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the one kernel: REG, STACK, SHARED, LOCAL."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_BIN / "cuobjdump"), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def compiled(
    kernel: Any,
    arguments: dict[str, Any],
    architecture: int | str,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """The kernel for ``sm_<architecture>``, or one of AMD's by its name.

    Args:
        arguments: by name: a type such as "*fp32" or "i64", or ("constexpr", value); None is
            ("constexpr", None).
        aligned: the arguments that a launch finds to be multiples of 16.
        options: as in a launch (num_warps, enable_fp_fusion, debug).
    """
    constants = {
        name: value[1] if isinstance(value, tuple) else None
        for name, value in arguments.items()
        if value is None or isinstance(value, tuple)
    }
    signature = {n: "constexpr" if n in constants else value for n, value in arguments.items()}
    positions = {name: i for i, name in enumerate(kernel.arg_names)}
    assert list(arguments) == list(kernel.arg_names), kernel.arg_names
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name in aligned:
        attributes[(positions[name],)] = [["tt.divisibility", 16]]
    if isinstance(architecture, str):  # there a launch finds tensors below 2 GiB, too
        for name in _specialized_pointers(kernel, arguments):
            attributes.setdefault((positions[name],), []).append(["tt.pointer_range", 32])
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    if isinstance(architecture, str):
        return _of_amd(source, GPUTarget("hip", architecture, AMD[architecture]), options)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    used = _resources(binary.asm["cubin"])
    # Registers that do not fit go to the stack, and nothing else of these kernels does.
    spilled = used["STACK"] + used["LOCAL"]
    return Compiled(binary.asm["ptx"], used["REG"], spilled, binary.metadata.shared)


def _specialized_pointers(kernel: Any, arguments: dict[str, Any]) -> list[str]:
    pointers = [name for name, value in arguments.items() if str(value).startswith("*")]
    return [p.name for p in kernel.params if p.name in pointers and not p.do_not_specialize]


def _of_amd(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    binary = triton.compile(source, target=target, options=options)
    assembly = binary.asm["amdgcn"]

    def used(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)$", assembly, re.M)
        assert found is not None, name
        return int(found[1])

    spilled = 4 * used("vgpr_spill_count") + 4 * used("sgpr_spill_count")
    spilled += used("private_segment_fixed_size")
    return Compiled(assembly, used("vgpr_count"), spilled, binary.metadata.shared)
