// Walks over rows for the kernels of losses: which threads share a row, in which order they read
// it, and how the sums of each become the row's result.
//
// A row is cut into vectors from its first element on, whatever its address: which thread adds
// which elements, and in which order, depends on the shape and the device alone. So a row's result
// has the same bits in a slice as in a copy, with or without a selection after it, on every run.
#pragma once

#include <algorithm>

#include "loss/loss.h"
#include "loss/pieces.cuh"

namespace ksam::gpu {

constexpr int kRowShift = gpu_or_simt(8, 7);
constexpr int kRowThreads = 1 << kRowShift;  // of a block
// The longest row that a warp takes, in batches or spans of its lanes.
constexpr int kTurnsOfWarp = gpu_or_simt(4, 1);
// Blocks that each multiprocessor should have, so that enough loads are in flight.
constexpr int kBlocksWanted = gpu_or_simt(2, 4);
// With at least this many rows for each multiprocessor, there is one for every warp.
constexpr int kManyWarps = 32;

constexpr int kWarpShift = 5;
static_assert(1 << kWarpShift == kWarp && kRowShift > kWarpShift && kRowShift <= 2 * kWarpShift);

// --- Threads ------------------------------------------------------------------------------------

// How rows are spread over a grid. A short row gets 2^shift lanes of a warp. A long one gets a
// block or, where there are too few rows to keep the device busy, gridDim.y blocks.
struct RowPlan {
  int shift;  // a row has 2^shift threads of a block
  dim3 grid;

  bool by_block() const { return shift > kWarpShift; }
  bool is_split() const { return grid.y > 1; }
};

// How many blocks a multiprocessor has registers for: where some lanes of a warp have a row, and
// where a block has one.
struct Resident {
  int by_lanes, by_block;
};

inline int log2_ceil(int64_t n) {
  int log = 0;
  while (int64_t{1} << log < n) ++log;
  return log;
}

// How many blocks to launch for the work that `needed` blocks would do in one turn each, if a
// multiprocessor runs `resident` at once. All blocks run at once and take about the same number of
// turns, so that none begins only when the others are done.
inline unsigned row_blocks(int64_t needed, int resident) {
  const int64_t slots = int64_t{resident} * multiprocessors();
  const int64_t turns = (needed + slots - 1) / slots;
  return static_cast<unsigned>((needed + turns - 1) / turns);
}

// The plan of a reduction over rows > 0, for threads whose spans have `pieces` vectors of
// per_vector elements. The order in which a row is added up follows from `shift` and grid.y. These
// must not depend on `resident`, which differs between kernels.
inline RowPlan plan_rows(int64_t rows, int64_t columns, int per_vector, int pieces,
                         Resident resident) {
  const int64_t vectors = (columns + per_vector - 1) / per_vector;
  // A row costs a warp less than a block. Where there are enough rows for all warps, that is true
  // of longer rows, too.
  const bool many = rows >= int64_t{kManyWarps} * multiprocessors();
  if (vectors <= kTurnsOfWarp * kWarp * (many ? pieces : kUnroll)) {
    // As few lanes as have `pieces` vectors each: sums across lanes cost more than those in a lane.
    const int needed = log2_ceil((vectors + pieces - 1) / pieces);
    const int shift = std::min(needed, kWarpShift);
    const int per_block = kRowThreads >> shift;
    return {shift, dim3(row_blocks((rows + per_block - 1) / per_block, resident.by_lanes), 1)};
  }
  const int64_t wanted = int64_t{kBlocksWanted} * multiprocessors() / rows;
  const int64_t worth = vectors / (kRowThreads * pieces);
  const int64_t parts = std::max<int64_t>(std::min(wanted, worth), 1);
  return {kRowShift, dim3(row_blocks(rows, resident.by_block), static_cast<unsigned>(parts))};
}

// --- Gradients ----------------------------------------------------------------------------------

// gradients.write(i, team) writes a thread's portion of the gradient of row i. A row has 2^shift
// threads of each of gridDim.y blocks.
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

// The plan of a gradient. As nothing is added up over a row, a batch is enough work for a thread.
inline RowPlan plan_gradient(int64_t rows, int64_t columns, int per_vector, int resident) {
  // One more than a row fills, as it may not begin at a vector's boundary.
  const int64_t turns = (columns + per_vector * kUnroll - 1) / (per_vector * kUnroll) + 1;
  const int needed = log2_ceil(turns);
  const int shift = std::min(needed, kRowShift);
  const int per_block = kRowThreads >> shift;
  const unsigned x = row_blocks((rows + per_block - 1) / per_block, resident);
  const int64_t worth = (turns + kRowThreads - 1) / kRowThreads;
  const int64_t capacity = int64_t{resident} * multiprocessors() / x;
  const int64_t parts = std::max<int64_t>(std::min(worth, capacity), 1);
  return {shift, dim3(x, static_cast<unsigned>(parts))};
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
//   kResident                  a Resident, how many blocks of its kernels run at once
//   struct Sums                what is added up over a row; when constructed, of no elements
//   struct Row; row(i)         what is known of row i beforehand
//   settle(&row)               finds out what has to be known of a row before it is finished
//   add(&row, team, &sums)     adds the calling thread's portion of a row
//   merge(&sums, other)        adds the sums of another portion; the order and grouping of the
//                              calls must not depend on timing
//   merge_lanes(shift, &sums)  gives each of 2^shift lanes the sums of all of them
//   load(p)                    reads sums that another block has written
//   finish(row, sums)          writes the row's result

// The values of 2^shift lanes, combined by combine(own, other), in all of these lanes.
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

// Reduces the rows of warp `warp` of `warps`, with 2^shift lanes for each. A lane's portion of row
// i is what add(i, row, lane, &sums) adds; the first lane finishes the row.
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

// The sums over all threads of the block, in thread 0.
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

// A tail is what the last block does once all rows are finished. It has
//   ticket       the counter of blocks that are done; may be null where no block counts
//   is_wanted()  whether there is anything to do
//   run()        does it, with all threads of the block
struct NoTail {
  unsigned* ticket;
  __device__ __forceinline__ bool is_wanted() const { return false; }
  __device__ __forceinline__ void run() const {}
};

// For short rows: each has some lanes of a warp.
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

// For long rows. Where rows are split over gridDim.y blocks, the sums of their parts go to
// partial[rows, gridDim.y], and the last of all blocks merges them.
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

// Scratch of a reduction: first the ticket's fallback, padded to keep what follows aligned; then
// the sums of split rows.
constexpr int64_t kTicketSlotBytes = 16;

template <class R>
int64_t reduction_scratch_bytes(int64_t rows, const RowPlan& plan, bool has_tail) {
  if (!plan.is_split()) return has_tail ? kTicketSlotBytes : 0;
  return kTicketSlotBytes + rows * plan.grid.y * int64_t{sizeof(typename R::Sums)};
}

template <class R, class Tail>
void launch_reduction(const R& reduction, int64_t rows, const RowPlan& plan, Tail tail,
                      bool has_tail, void* scratch, Stream stream) {
  using Sums = typename R::Sums;
  Sums* partial = nullptr;
  if (has_tail || plan.is_split()) {
    tail.ticket = ticket(stream, scratch);
    partial = reinterpret_cast<Sums*>(static_cast<char*>(scratch) + kTicketSlotBytes);
  }
  if (plan.by_block()) {
    launch(blocks_kernel<R, Tail>, plan.grid, kRowThreads, stream, reduction, rows, partial, tail);
  } else {
    launch(lanes_kernel<R, Tail>, plan.grid, kRowThreads, stream, reduction, rows, plan.shift,
           tail);
  }
}

}  // namespace ksam::gpu
