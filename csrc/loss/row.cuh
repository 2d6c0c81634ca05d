// How the kernels of the loss room walk over rows: which threads share a row, in which order they
// read it, and how what they add up becomes the row's result.
//
// A row is cut into vectors from its first element on, whatever its address: which thread adds
// which elements, and in which order, depends on the shape and the device alone. So a row has the
// same bits in a slice as in a copy, with or without a selection after it, on every run.
#pragma once

#include <algorithm>

#include "loss/loss.h"
#include "loss/pieces.cuh"

namespace ksam::gpu {

#if defined(KSAM_SIMT)  // so that the tests' small rows come to every regime
constexpr int kRowShift = 7;
constexpr int kTurnsOfWarp = 1;
constexpr int kBlocksWanted = 4;
#else
constexpr int kRowShift = 8;
constexpr int kTurnsOfWarp = 4;   // the longest row of a warp, in batches or spans of its lanes
constexpr int kBlocksWanted = 2;  // of a multiprocessor, which have then enough loads in flight
#endif
constexpr int kManyWarps = 32;  // of a multiprocessor, that have a row each where rows are many
constexpr int kRowThreads = 1 << kRowShift;  // of a block

constexpr int kWarpShift = 5;
static_assert(1 << kWarpShift == kWarp && kRowShift > kWarpShift && kRowShift <= 2 * kWarpShift);

// --- Threads ------------------------------------------------------------------------------------

// Rows over a grid. Short rows: 2^shift lanes of a warp each. Long ones: a block each or, where
// there are too few of them to keep the device busy, gridDim.y blocks each.
struct RowPlan {
  int shift;  // 2^shift threads of a block have a row
  dim3 grid;

  bool by_block() const { return shift > kWarpShift; }
  bool is_split() const { return grid.y > 1; }
};

// Blocks of a multiprocessor that there are registers for, where lanes or a block have a row.
struct Resident {
  int by_lanes, by_block;
};

inline int log2_ceil(int64_t n) {
  int log = 0;
  while (int64_t{1} << log < n) ++log;
  return log;
}

// Blocks for what `needed` blocks would do in one turn each, of which `resident` run on a
// multiprocessor at once: as many turns for all, and no block begins when others are done.
inline unsigned row_blocks(int64_t needed, int resident) {
  const int64_t slots = int64_t{resident} * multiprocessors();
  const int64_t turns = (needed + slots - 1) / slots;
  return static_cast<unsigned>((needed + turns - 1) / turns);
}

// rows > 0; a thread's spans have `pieces` vectors of per_vector elements each. The order in which
// a row is added up follows from this: it must not depend on `resident`, so on the kernel.
inline RowPlan plan_rows(int64_t rows, int64_t columns, int per_vector, int pieces,
                         Resident resident) {
  const int64_t vectors = (columns + per_vector - 1) / per_vector;
  // A row costs a warp less than a block, up to longer rows where there are enough for all warps.
  const bool many = rows >= int64_t{kManyWarps} * multiprocessors();
  if (vectors <= kTurnsOfWarp * kWarp * (many ? pieces : kUnroll)) {
    // Few lanes with `pieces` vectors each: sums across lanes cost more than those in a lane.
    const int needed = log2_ceil((vectors + pieces - 1) / pieces);
    const int shift = std::min(needed, kWarpShift);
    const int per_block = kRowThreads >> shift;
    return {shift, dim3(row_blocks((rows + per_block - 1) / per_block, resident.by_lanes), 1)};
  }
  const int64_t wanted = int64_t{kBlocksWanted} * multiprocessors() / rows;
  const int64_t worth = vectors / (kRowThreads * pieces);
  const int64_t parts = wanted < worth ? wanted : worth;
  return {kRowShift,
          dim3(row_blocks(rows, resident.by_block), static_cast<unsigned>(parts > 1 ? parts : 1))};
}

// --- Gradients ----------------------------------------------------------------------------------

// gradients.write(i, team): a thread's share of the gradient of row i, 2^shift threads of a block
// and gridDim.y blocks having a row.
template <class G>
__global__ void __launch_bounds__(kRowThreads, G::kResident)
    gradient_kernel(KSAM_PARAMETER(G) gradients, int64_t rows, int shift) {
  const int64_t per_block = kRowThreads >> shift;
  const int threads = 1 << shift, thread = static_cast<int>(threadIdx.x) & (threads - 1);
  const Team<0> team{thread, threads, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  for (int64_t i = blockIdx.x * per_block + (threadIdx.x >> shift); i < rows;
       i += gridDim.x * per_block) {
    gradients.write(i, team);
  }
}

// Of a gradient, in which nothing is added up over a row: a batch is enough work for a thread.
inline RowPlan plan_gradient(int64_t rows, int64_t columns, int per_vector, int resident) {
  // One more, as rows do not begin at a boundary.
  const int64_t turns = (columns + per_vector * kUnroll - 1) / (per_vector * kUnroll) + 1;
  const int needed = log2_ceil(turns);
  const int shift = needed < kRowShift ? needed : kRowShift;
  const int per_block = kRowThreads >> shift;
  const unsigned x = row_blocks((rows + per_block - 1) / per_block, resident);
  const int64_t worth = (turns + kRowThreads - 1) / kRowThreads;
  const int64_t room = int64_t{resident} * multiprocessors() / x;
  const int64_t parts = worth < room ? worth : room;
  return {shift, dim3(x, static_cast<unsigned>(parts > 1 ? parts : 1))};
}

template <class G>
void launch_gradient(const G& gradients, int64_t rows, int64_t columns, int per_vector,
                     Stream stream) {
  const RowPlan plan = plan_gradient(rows, columns, per_vector, G::kResident);
  launch(gradient_kernel<G>, plan.grid, kRowThreads, stream, gradients, rows, plan.shift);
}

// --- Reductions ---------------------------------------------------------------------------------
//
// A reduction has
//   kResident                 of its kernels, a Resident
//   struct Sums               what is added up over a row; at first, what no element gives
//   struct Row; row(i)        what is known of row i beforehand
//   settle(&row)              what there is to find out about a row before it is finished
//   add(&row, team, &sums)    the share of a thread
//   merge(&sums, other)       two shares as one; neither order nor grouping follows from timing
//   merge_lanes(shift, &sums)  those of 2^shift lanes, in all of them
//   load(p)                   sums that another block has written
//   finish(row, sums)         writes the row's result

// The sum, or what combine(own, other) makes of two at a time, over 2^shift lanes, in all of them.
template <class T, class Combine>
__device__ __forceinline__ T over_lanes(int shift, T value, const Combine& combine) {
  for (int by = 1 << shift >> 1; by > 0; by /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, by));
  }
  return value;
}
template <class T>
__device__ __forceinline__ T sum_over_lanes(int shift, T value) {
  return over_lanes(shift, value, [](T a, T b) { return a + b; });
}

// The rows of warp `warp` of `warps`, 2^shift lanes each: add(i, row, lane, &sums) adds a lane's
// share of row i, and the first lane finishes it.
template <class R, class Add>
__device__ __forceinline__ void rows_by_lanes(const R& reduction, int64_t rows, int shift,
                                              int64_t warp, int64_t warps, const Add& add) {
  const int per_warp = kWarp >> shift;
  const int lane = lane_of_thread() & ((1 << shift) - 1), of_warp = lane_of_thread() >> shift;
  for (int64_t i = warp * per_warp + of_warp; i - of_warp < rows; i += warps * per_warp) {
    typename R::Sums sums{};
    typename R::Row row{};
    if (i < rows) {
      row = reduction.row(i);
      add(i, &row, lane, &sums);
    }
    R::merge_lanes(shift, &sums);
    if (i < rows && lane == 0) reduction.finish(row, sums);
  }
}

// The sums of all threads of the block, in the first.
template <class R>
__device__ typename R::Sums merge_block(typename R::Sums sums) {
  __shared__ typename R::Sums of_warp[kRowThreads / kWarp];
  R::merge_lanes(kWarpShift, &sums);
  __syncthreads();  // the row before this one has been read
  if (lane_of_thread() == 0) of_warp[warp_of_thread()] = sums;
  __syncthreads();
  if (warp_of_thread() == 0) {
    sums = of_warp[lane_of_thread() % (kRowThreads / kWarp)];
    R::merge_lanes(kRowShift - kWarpShift, &sums);
  }
  return sums;
}

// What the last block does when all rows are finished has
//   ticket       the counter of blocks that are done; may be null where no block asks for it
//   is_wanted()
//   run()
struct NoTail {
  unsigned* ticket;
  __device__ __forceinline__ bool is_wanted() const { return false; }
  __device__ __forceinline__ void run() const {}
};

// Short rows.
template <class R, class Tail>
__global__ void __launch_bounds__(kRowThreads, R::kResident.by_lanes)
    lanes_kernel(KSAM_PARAMETER(R) reduction, int64_t rows, int shift, KSAM_PARAMETER(Tail) tail) {
  constexpr int kWarps = kRowThreads / kWarp;
  rows_by_lanes(reduction, rows, shift, int64_t{blockIdx.x} * kWarps + warp_of_thread(),
                int64_t{gridDim.x} * kWarps, [&](int64_t, auto* row, int lane, auto* sums) {
                  reduction.add(row, Team<0>{lane, 1 << shift, 0, 1}, sums);
                });
  if (tail.is_wanted() && last_block(tail.ticket, gridDim.x)) tail.run();
}

// Long rows. The last of all blocks puts the parts of split rows, partial[rows, gridDim.y],
// together.
template <class R, class Tail>
__global__ void __launch_bounds__(kRowThreads, R::kResident.by_block)
    blocks_kernel(KSAM_PARAMETER(R) reduction, int64_t rows, typename R::Sums* partial,
                  KSAM_PARAMETER(Tail) tail) {
  const int parts = static_cast<int>(gridDim.y);
  const Team<kRowThreads> team{static_cast<int>(threadIdx.x), kRowThreads,
                               static_cast<int>(blockIdx.y), parts};
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    auto row = reduction.row(i);
    typename R::Sums sums{};
    reduction.add(&row, team, &sums);
    sums = merge_block<R>(sums);
    if (threadIdx.x == 0) {
      if (parts == 1) {
        reduction.finish(row, sums);
      } else {
        partial[i * parts + blockIdx.y] = sums;
      }
    }
  }
  if (parts == 1 && !tail.is_wanted()) return;
  if (!last_block(tail.ticket, gridDim.x * gridDim.y)) return;
  if (parts > 1) {
    int shift = 0;
    while (shift < kWarpShift && 1 << shift < parts) ++shift;
    rows_by_lanes(reduction, rows, shift, warp_of_thread(), kRowThreads / kWarp,
                  [&](int64_t i, auto* row, int lane, auto* sums) {
                    reduction.settle(row);
                    for (int64_t part = lane; part < parts; part += 1 << shift) {
                      R::merge(sums, R::load(partial + i * parts + part));
                    }
                  });
    __syncthreads();
  }
  if (tail.is_wanted()) tail.run();
}

// Scratch of a reduction: the ticket's fallback, then the sums of split rows.
constexpr int64_t kTicketRoom = 16;

template <class R>
int64_t reduction_scratch_bytes(int64_t rows, const RowPlan& plan, bool has_tail) {
  if (!plan.is_split()) return has_tail ? kTicketRoom : 0;
  return kTicketRoom + rows * plan.grid.y * int64_t{sizeof(typename R::Sums)};
}

template <class R, class Tail>
void launch_reduction(const R& reduction, int64_t rows, const RowPlan& plan, Tail tail,
                      bool has_tail, void* scratch, Stream stream) {
  using Sums = typename R::Sums;
  Sums* partial = nullptr;
  if (has_tail || plan.is_split()) {
    tail.ticket = ticket(stream, scratch);
    partial = reinterpret_cast<Sums*>(static_cast<char*>(scratch) + kTicketRoom);
  }
  if (plan.by_block()) {
    launch(blocks_kernel<R, Tail>, plan.grid, kRowThreads, stream, reduction, rows, partial, tail);
  } else {
    launch(lanes_kernel<R, Tail>, plan.grid, kRowThreads, stream, reduction, rows, plan.shift,
           tail);
  }
}

}  // namespace ksam::gpu
