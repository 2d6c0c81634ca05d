"""The faults that tests.simt.mutations puts into the kernels, room by room."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One fault: in a file of csrc, the first `old` becomes `new`."""

    what: str
    file: str
    old: str
    new: str
    tests: str = ""  # pytest's arguments
    sanitize: str = ""  # ... or the sanitizer under which every kernel is run once

    @property
    def name(self) -> str:
        return f"{self.file}, {self.what}"

    def apply(self, text: str) -> str:
        if self.old not in text:
            raise ValueError(f"{self.what}: {self.file} does not hold {self.old!r}")
        return text.replace(self.old, self.new, 1)


TOPK = "tests/topk"
_TOPK = (
    Mutation(
        "no barrier between clearing and counting digits",
        "topk/select.cuh",
        "shared.count[d] = 0;\n  __syncthreads();",
        "shared.count[d] = 0;",
        TOPK,
    ),
    Mutation(
        "a plain store where threads add to one count",
        "topk/select.cuh",
        "atomicAdd(&shared.count[digit], 1u)",
        "shared.count[digit] += 1u",
        sanitize="thread",
    ),
    Mutation(
        "no barrier after counting digits",
        "topk/select.cuh",
        "1u);\n  });\n  __syncthreads();",
        "1u);\n  });",
        sanitize="thread",
    ),
    Mutation(
        "ties to the highest index",
        "topk/select.cuh",
        "ahead.equal < at.wanted))",
        "ahead.equal >= at.wanted))",
        TOPK,
    ),
    Mutation(
        "an element too many",
        "topk/select.cuh",
        "(i < end_ ? i : end_ - 1)",
        "(i <= end_ ? i : end_ - 1)",
        sanitize="address,undefined",
    ),
    Mutation(
        "the last element left out",
        "topk/select.cuh",
        "return index(r) < end_;",
        "return index(r) + 1 < end_;",
        TOPK,
    ),
    Mutation(
        "-0 below +0",
        "topk/topk_key.h",
        "magnitude == 0 ? 0x80000000u : ordered",
        "ordered",
        TOPK,
    ),
    Mutation(
        "no barrier of the grid before global counts are read",
        "topk/topk.cu",
        "grid.sync();\n    for (int d",
        "for (int d",
        TOPK,
    ),
    Mutation(
        "global counts that are not cleared",
        "topk/topk.cu",
        "scratch.count[i] = 0;",
        "(void)i;",
        TOPK,
    ),
    Mutation(
        "a shuffle that a part of the warp leaves out",
        "topk/select.cuh",
        "const uint32_t before = __shfl_up_sync(kAllLanes, value, by);\n    if",
        "if (lane_of_thread() < by) continue;\n    const uint32_t before = "
        "__shfl_up_sync(kAllLanes, value, by);\n    if",
        TOPK,
    ),
)

COMPACT = "tests/compact"
_COMPACT = (
    Mutation(
        "a vector too many",
        "compact/compact.cu",
        "if (thread + i * kThreads < count)",
        "if (thread + i * kThreads <= count)",
        sanitize="address,undefined",
    ),
    Mutation(
        "the source's stride taken for the row's length",
        "compact/compact.cu",
        "index[i] * leaf.source_stride",
        "index[i] * leaf.row_bytes",
        COMPACT,
    ),
    Mutation(
        "vectors wider than the stride allows",
        "compact/compact.cu",
        "leaf.source_stride | leaf.row_bytes",
        "leaf.row_bytes",
        COMPACT,
    ),
    Mutation(
        "the leaf before the tile's",
        "compact/compact.cu",
        "first_tile <= tile",
        "first_tile < tile",
        COMPACT,
    ),
    Mutation(
        "indices out of range go unnoticed",
        "compact/compact.cu",
        "KSAM_DEVICE_ASSERT(all_indices_in_range);",
        "",
        COMPACT,
    ),
)

LOSS = "tests/loss/test_cross_entropy.py"
_LOSS = (
    Mutation(
        "no barrier before the sums of warps are read",
        "loss/row.cuh",
        "of_warp[warp_of_thread()] = sums;\n  __syncthreads();",
        "of_warp[warp_of_thread()] = sums;",
        LOSS,
    ),
    Mutation(
        "no barrier after the sums of warps are read",
        "loss/row.cuh",
        "__syncthreads();  // the row before this one has been read",
        "",
        sanitize="thread",
    ),
    Mutation(
        "the maximum does not rise",
        "loss/cross_entropy.cu",
        "if (high > sums->max)",
        "if (high > sums->max && sums->max == -HUGE_VALF)",
        LOSS,
    ),
    Mutation(
        "a tail one element too long",
        "loss/pieces.cuh",
        "left < N ? static_cast<int>(left < 0 ? 0 : left) : N",
        "left < N ? static_cast<int>(left < 0 ? 0 : left + 1) : N",
        LOSS,
    ),
    Mutation(
        "a span of whole vectors past the end of its row",
        "loss/pieces.cuh",
        "if (first + (kPieces - 1) * threads < vectors) {",
        "if (first < vectors) {",
        LOSS,
    ),
    Mutation(
        "the batches of a span for other parts of a row",
        "loss/pieces.cuh",
        "if (done % kBatches == 0) first += skipped;",
        "first += skipped;",
        "tests/loss/test_blocks_of_rows.py",
    ),
    Mutation(
        "the batches of a whole row's span for other parts of it",
        "loss/pieces.cuh",
        "if (kAtOnce == kBatches || done % kBatches == 0) first += skipped;",
        "first += skipped;",
        "tests/loss/test_blocks_of_rows.py",
    ),
    Mutation(
        "elements read past the end of a row, and left out after it",
        "loss/pieces.cuh",
        "put(&to, j, piece.has(j) ? p[j] : fill);",
        "{ const T x = p[j]; put(&to, j, piece.has(j) ? x : fill); }",
        sanitize="address,undefined",
    ),
    Mutation(
        "a vector that is not aligned in one of two arrays",
        "loss/cross_entropy_backward.cu",
        "offset_of(x, lead)",
        "offset_of(x)",
        "tests/loss/test_cross_entropy_backward.py",
    ),
    Mutation(
        "no barrier before the parts of a row are read",
        "loss/cross_entropy_planes.cu",
        "      __syncthreads();\n      if (team.part > 0) return;",
        "      if (team.part > 0) return;",
        "tests/loss/test_planes.py",
    ),
    Mutation(
        "a row's class taken for one of the first group",
        "loss/cross_entropy_planes.cu",
        "i / group * group_stride + i % group",
        "i % group",
        "tests/loss/test_planes.py",
    ),
    Mutation(
        "classes read past the last",
        "loss/cross_entropy_planes.cu",
        "const bool is_there = whole || first + u < classes;",
        "const bool is_there = true;",
        sanitize="address,undefined",
    ),
    Mutation(
        "a ticket that is not reset",
        "common/block.cuh",
        "atomicInc(counter, last)",
        "atomicAdd(counter, 1u)",
        "tests/loss/test_select_cross_entropy.py",
    ),
)

PERTURB = "tests/perturb/test_perturb.py"
SGD = "tests/perturb/test_restore_sgd.py"
_PERTURB = (
    Mutation(
        "no barrier after the formula of a row is made",
        "perturb/elements.cuh",
        "element<A>(args, value);\n  __syncthreads();",
        "element<A>(args, value);",
        SGD,
    ),
    Mutation(
        "vectors read past the end of a chunk",
        "perturb/elements.cuh",
        "if (reads<Formula>(i) && at < end)",
        "if (reads<Formula>(i))",
        sanitize="address,undefined",
    ),
    Mutation(
        "vectors whatever the alignment",
        "perturb/elements.cuh",
        "addresses % kVectorBytes == 0 ? ",
        "addresses % sizeof(T) == 0 ? ",
        "tests/perturb/test_exact.py",
    ),
    Mutation(
        "launches of one norm write to the same places",
        "perturb/perturb.cu",
        "args.partial[args.first + blockIdx.x]",
        "args.partial[blockIdx.x]",
        "tests/perturb",
    ),
    Mutation(
        "every block counts the steps up",
        "perturb/update.cu",
        "if (args.ticket == nullptr || !last_block(args.ticket, gridDim.x)) return;",
        "if (args.ticket == nullptr) return;",
        "tests/perturb",
    ),
    Mutation(
        "a word of shared memory that nobody writes",
        "common/block.cuh",
        "if (lane_of_thread() == 0) of_warp[warp_of_thread()] = value;",
        "if (lane_of_thread() == 0 && threadIdx.x != 0) of_warp[warp_of_thread()] = value;",
        sanitize="memory",
    ),
)

MUTATIONS = (*_TOPK, *_COMPACT, *_LOSS, *_PERTURB)
