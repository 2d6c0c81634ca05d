"""Top-k selection by Triton kernels: radix selection on losses in their order as signed integers.

Positions follow from how many selected losses come before an index, so the result is ascending and
does not depend on the order of atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ksam_kernels.triton_support import EXACT, most_warps, on_device_of

#: Up to so many losses, one program selects, in one launch: its keys lie in registers, 32 a thread.
#: For float64 it is half as many.
ONE_PROGRAM = 32768
#: Losses whose places it finds at once.
STEP = 2048
#: Losses that a program of a larger selection handles at once.
BLOCK, WARPS = 4096, 16
#: The most programs of a larger selection, each of which adds up what those before it selected.
MOST_PROGRAMS = 1024

DIGIT_BITS = tl.constexpr(8)
DIGITS = tl.constexpr(256)


# --- Keys ---------------------------------------------------------------------------------------


@triton.jit
def keys_of(losses, i, stride, inside, LOWEST: tl.constexpr):
    """Losses -> integers in the same order: every NaN is the largest, both zeros are one; outside,
    LOWEST, which no loss has. Computed in integers, so that no denormal is flushed; 16-bit floats
    as the float32 that they equal.
    """
    x = tl.load(losses + i * stride, mask=inside, other=0)
    if losses.dtype.element_ty == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
        key = tl.where(magnitude > 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF, key)
    else:
        if losses.dtype.element_ty == tl.bfloat16:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        else:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)
    key = tl.where(magnitude == 0, 0, key)
    return tl.where(inside, key, LOWEST)


@triton.jit
def store_selected(
    out,  # [k]
    i,  # [BLOCK] indices
    greater,  # [BLOCK] whether selected
    equal,  # [BLOCK] whether selected if among the first `wanted` of these
    wanted,
    greater_before,  # of both, in blocks before this one
    equal_before,
):
    """out <- the selected indices. Both are counted in one scan, in halves of an integer."""
    tl.static_assert(i.shape[0] < 32768)
    packed = greater.to(tl.int32) + (equal.to(tl.int32) << 16)
    ahead = tl.cumsum(packed, 0) - packed
    greaters = greater_before + (ahead & 0xFFFF)
    equals = equal_before + (ahead >> 16)
    chosen = greater | (equal & (equals < wanted))
    tl.store(out + greaters + tl.minimum(equals, wanted), i, mask=chosen)


# --- One program --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["stride", "n", "k"])
def select_kernel(
    losses,  # [n]
    stride: tl.int64,
    n: tl.int32,
    k: tl.int32,
    out,  # [k] int64
    KEY: tl.constexpr,  # int32 or int64
    LOWEST: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out <- indices of the k largest, ascending. By one program: the k-th largest key is found bit
    by bit, the highest first: a bit is set if at least k keys are not below the candidate with it.

    Bytes moved: each loss once, 8 k.
    """
    i = tl.arange(0, BLOCK)
    key = keys_of(losses, i.to(tl.int64), stride, i < n, LOWEST)
    lowest = tl.full([], LOWEST, KEY)
    one = tl.full([], 1, KEY)
    found = tl.full([], 0, KEY)  # key - LOWEST as an unsigned integer
    bit = BITS - 1
    while bit >= 0:
        candidate = found | (one << bit)
        count = tl.sum((key >= (candidate ^ lowest)).to(tl.int32), 0)
        found = tl.where(count >= k, candidate, found)
        bit = tl.where(count == k, -1, bit - 1)  # these are the k
    threshold = found ^ lowest
    wanted = k - tl.sum((key > threshold).to(tl.int32), 0)
    greater_before = tl.full([], 0, tl.int32)
    equal_before = tl.full([], 0, tl.int32)
    # Fewer at a time than in the search, and read again from the cache: registers have no room for
    # the addresses and counts of all beside the keys.
    for start in range(0, n, STEP):
        j = start + tl.arange(0, STEP)
        some = keys_of(losses, j.to(tl.int64), stride, j < n, LOWEST)
        greater, equal = some > threshold, some == threshold
        store_selected(out, j.to(tl.int64), greater, equal, wanted, greater_before, equal_before)
        greater_before += tl.sum(greater.to(tl.int32), 0)
        equal_before += tl.sum(equal.to(tl.int32), 0)


# --- Many programs ------------------------------------------------------------------------------
#
# A launch for every digit, which counts the digits among the keys that agree with those found so
# far; one that counts what each program selects; one that writes. Every program finds a digit from
# the counts of the launch before, and the first leaves it for the next. Digits are those of
# key - LOWEST, an unsigned integer, from the highest.


@triton.jit
def threshold_of(
    states,  # [passes, 2] int64
    counts,  # [passes, DIGITS] int64
    index,  # how many digits are found
    k,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
):
    """The digits found, in their places, and how many keys that agree in them are selected."""
    found = tl.full([], 0, tl.int64)
    wanted = k.to(tl.int64)
    if index > 0:
        found = tl.load(states + 2 * (index - 1))
        wanted = tl.load(states + 2 * (index - 1) + 1)
        d = (DIGITS - 1) - tl.arange(0, DIGITS)
        through = tl.cumsum(tl.load(counts + (index - 1) * DIGITS + d), 0)  # of d and all above
        higher = through < wanted
        digit = (DIGITS - 1) - tl.sum(higher.to(tl.int64), 0)
        wanted -= tl.max(tl.where(higher, through, 0), 0)
        found |= digit << (BITS - DIGIT_BITS * index)
    return found.to(KEY), wanted


@triton.jit(do_not_specialize=["stride", "n", "k", "share", "index"])
def digit_kernel(
    losses,  # [n]
    stride: tl.int64,
    n: tl.int64,
    k: tl.int64,
    share: tl.int64,  # losses of a program, a multiple of BLOCK
    states,  # [passes, 2] int64
    counts,  # [passes, DIGITS] int64, zeros
    index: tl.int32,  # of the digit
    KEY: tl.constexpr,
    LOWEST: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[index] += how many keys have each digit, among those that agree in the digits before.

    Bytes moved: each loss once.
    """
    found, wanted = threshold_of(states, counts, index, k, KEY, BITS)
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(states + 2 * index, found.to(tl.int64))
        tl.store(states + 2 * index + 1, wanted)
    shift = BITS - DIGIT_BITS * (index + 1)
    lowest = tl.full([], LOWEST, KEY)
    one = tl.full([], 1, KEY)
    known = -((one << (shift + DIGIT_BITS - 1)) << 1)  # no digit: 1 << BITS, which is 0
    histogram = tl.zeros([DIGITS], tl.int32)
    for start in range(program * share, tl.minimum((program + 1) * share, n), BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = keys_of(losses, i, stride, i < n, LOWEST) ^ lowest
        agrees = (i < n) & ((key & known) == found)
        digit = ((key >> shift) & (DIGITS - 1)).to(tl.int32)
        histogram += tl.histogram(digit, DIGITS, mask=agrees)
    at = counts + index * DIGITS + tl.arange(0, DIGITS)
    tl.atomic_add(at, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")


@triton.jit(do_not_specialize=["stride", "n", "k", "share", "index"])
def select_share_kernel(
    losses,  # [n]
    stride: tl.int64,
    n: tl.int64,
    k: tl.int64,
    share: tl.int64,
    states,
    counts,
    index: tl.int32,  # all digits
    selected,  # [2, MOST]: keys of each program above the threshold, and at it
    out,  # [k] int64
    WRITES: tl.constexpr,  # out; otherwise selected
    KEY: tl.constexpr,
    LOWEST: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    """Bytes moved: each loss once, and 8 k where it writes."""
    found, wanted = threshold_of(states, counts, index, k, KEY, BITS)
    threshold = found ^ tl.full([], LOWEST, KEY)
    program = tl.program_id(0).to(tl.int64)
    greater_before = tl.full([], 0, tl.int64)
    equal_before = tl.full([], 0, tl.int64)
    if WRITES:
        before = tl.arange(0, MOST)
        is_before = before < program
        greater_before += tl.sum(tl.load(selected + before, mask=is_before, other=0), 0)
        equal_before += tl.sum(tl.load(selected + MOST + before, mask=is_before, other=0), 0)
    for start in range(program * share, tl.minimum((program + 1) * share, n), BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = keys_of(losses, i, stride, i < n, LOWEST)
        greater, equal = key > threshold, key == threshold
        if WRITES:
            store_selected(out, i, greater, equal, wanted, greater_before, equal_before)
        greater_before += tl.sum(greater.to(tl.int32), 0)
        equal_before += tl.sum(equal.to(tl.int32), 0)
    if not WRITES:
        tl.store(selected + program, greater_before)
        tl.store(selected + MOST + program, equal_before)


# --- Launches -----------------------------------------------------------------------------------


def topk_indices(
    losses: Tensor,  # [B]
    k: int,
) -> Tensor:
    """Indices [k] int64, ascending, of the k largest losses.

    Launches: 1 up to ONE_PROGRAM losses; above, one for the zeros, one for each digit and two more:
    7, or 11 for float64.
    """
    n, out = losses.shape[0], losses.new_empty((k,), dtype=torch.int64)
    bits = 64 if losses.dtype == torch.float64 else 32
    key = {"KEY": tl.int64 if bits == 64 else tl.int32, "LOWEST": -(2 ** (bits - 1)), "BITS": bits}
    given = {"losses": losses, "stride": losses.stride(0), "n": n, "k": k, **EXACT}
    with on_device_of(losses):
        if n <= ONE_PROGRAM * 32 // bits:
            block = triton.next_power_of_2(n)
            # 8 losses a thread, while there are threads
            warps = min(max(block // 256, 1), most_warps(losses.device))
            select_kernel[(1,)](
                **given, out=out, BLOCK=block, STEP=min(block, STEP), num_warps=warps, **key
            )
            return out
        blocks = triton.cdiv(n, BLOCK)
        share = triton.cdiv(blocks, MOST_PROGRAMS) * BLOCK
        grid = (triton.cdiv(n, share),)
        passes = bits // DIGIT_BITS.value
        given.update(
            share=share,
            states=losses.new_empty((passes, 2), dtype=torch.int64),
            counts=losses.new_zeros((passes, DIGITS.value), dtype=torch.int64),
        )
        selected = losses.new_empty((2, MOST_PROGRAMS), dtype=torch.int64)
        options = {"BLOCK": BLOCK, "num_warps": WARPS, **key}
        for index in range(passes):
            digit_kernel[grid](**given, index=index, **options)
        given.update(index=passes, selected=selected, out=out, MOST=MOST_PROGRAMS)
        select_share_kernel[grid](**given, WRITES=False, **options)
        select_share_kernel[grid](**given, WRITES=True, **options)
    return out
