"""What Triton's kernels check on the device, where nobody waits for the answer.

``tl.device_assert`` prints a message. AMD's GPUs hand it to the host through a buffer that every
launch of such a kernel needs, whether it fails or not, and that machines whose PCIe has no atomics
do not have. On AMD a check that fails is thus a trap without a message; it also ends the process.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def check(
    condition,  # [N] booleans
    message: tl.constexpr,
    TRAPS: tl.constexpr,  # as triton_support.assertions sets it
):
    """Fail the kernel where the condition is false for any element."""
    if TRAPS:
        # Masking lanes out does not keep a warp from trapping: only a branch around it does.
        if tl.max((condition == 0).to(tl.int32), 0) != 0:
            trap: tl.constexpr = "s_trap 2\nv_mov_b32 $0, 0"  # it must have a result
            tl.inline_asm_elementwise(trap, "=v", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.device_assert(condition, message)
