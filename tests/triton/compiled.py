"""Triton kernels compiled without a GPU, and what the result takes of one.

``compiled(kernel, arguments, architecture)`` gives PTX and, by ptxas' own account, registers,
spills and shared memory.
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

#: None in what Triton compiles from 3.9 on; versions before put a few registers on the stack.
SPILL_BYTES = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 24

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    def widest(self, op: str) -> int:
        """Bytes of the widest global ``ld`` or ``st``."""
        found = re.findall(rf"\b{op}\.global((?:\.\w+)*?)(?:\.v(\d))?\.[a-z](\d+)\b", self.ptx)
        return max((int(lanes or 1) * int(size) // 8 for _, lanes, size in found), default=0)


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
    architecture: int,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """The kernel for ``sm_<architecture>``.

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
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(positions[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options=options)
    used = _resources(binary.asm["cubin"])
    # Registers that do not fit go to the stack, and nothing else of these kernels does.
    spilled = used["STACK"] + used["LOCAL"]
    return Compiled(binary.asm["ptx"], used["REG"], spilled, binary.metadata.shared)
