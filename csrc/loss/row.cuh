// How the kernels of the loss room walk over rows: which threads share a row, in which order they
// read it, and how what they add up becomes the row's result.
//
// A row is cut into vectors from its first element on, whatever its address: which thread adds
// which elements, and in which order, depends on the shape alone. So a row has the same bits in a
// slice as in a copy, with or without a selection after it, on every run.
#pragma once

#include "common/block.cuh"
#include "loss/loss.h"

namespace ksam::gpu {

constexpr int kUnroll = 4;  // vectors that a thread asks for before it uses the first

#if defined(KSAM_SIMT)  // so that the tests' small rows come to every regime
constexpr int kRowThreads = 128;
constexpr int kTurnsOfWarp = 1;
constexpr int kBlocksWanted = 4;
#else
constexpr int kRowThreads = 256;
constexpr int kTurnsOfWarp = 4;   // the longest row of a warp, in loads of kUnroll vectors a lane
constexpr int kBlocksWanted = 2;  // of a multiprocessor, which have then enough loads in flight
#endif
constexpr int kBlocksMost = 16;  // of a multiprocessor in a grid; more rows take several turns

static_assert(kRowThreads % kWarp == 0 && kRowThreads / kWarp <= kWarp);

// --- Threads ------------------------------------------------------------------------------------

// The threads of a row: this one is `thread` of `threads`.
struct Team {
  int64_t thread, threads;
};

// Rows over a grid. Short rows: 2^shift lanes of a warp each. Long ones: a block each or, where
// there are too few of them to keep the device busy, gridDim.y blocks each.
struct RowPlan {
  int shift;  // 2^shift threads of a block have a row
  dim3 grid;

  bool by_block() const { return 1 << shift > kWarp; }
  bool is_split() const { return grid.y > 1; }
};

inline int log2_ceil(int64_t n) {
  int log = 0;
  while (int64_t{1} << log < n) ++log;
  return log;
}

inline unsigned row_blocks(int64_t needed) {
  const int64_t most = int64_t{kBlocksMost} * multiprocessors();
  return static_cast<unsigned>(needed < most ? needed : most);
}

constexpr int kRowShift = kRowThreads == 256 ? 8 : 7;
static_assert(1 << kRowShift == kRowThreads);

// rows > 0; a thread takes per_vector elements at once.
inline RowPlan plan_rows(int64_t rows, int64_t columns, int per_vector) {
  const int64_t vectors = (columns + per_vector - 1) / per_vector;
  if (vectors <= kWarp * kUnroll * kTurnsOfWarp) {
    // Few lanes with kUnroll vectors each: sums across lanes cost more than those in a lane.
    const int needed = log2_ceil((vectors + kUnroll - 1) / kUnroll);
    const int shift = needed < 5 ? needed : 5;
    const int per_block = kRowThreads >> shift;
    return {shift, dim3(row_blocks((rows + per_block - 1) / per_block), 1)};
  }
  const int64_t wanted = int64_t{kBlocksWanted} * multiprocessors() / rows;
  const int64_t worth = vectors / (kRowThreads * kUnroll);
  const int64_t parts = wanted < worth ? wanted : worth;
  return {kRowShift, dim3(row_blocks(rows), static_cast<unsigned>(parts > 1 ? parts : 1))};
}

// --- Elements -----------------------------------------------------------------------------------

template <class T, int N>
struct Elements {
  T at[N];
};

// Whether a vector may lie `lead` elements before p.
template <class T>
__device__ __forceinline__ bool is_vector_aligned(const T* p, int lead = 0) {
  return (reinterpret_cast<uintptr_t>(p) - lead * sizeof(T)) % kVectorBytes == 0;
}

// Part of a row: elements first + [begin, end), of at most N.
struct Piece {
  int64_t first;
  int begin, end;

  __device__ __forceinline__ bool has(int j) const { return j >= begin && j < end; }
};

// N elements as they were loaded. Halves stay in pairs until they are used: taken apart at once,
// each load would be waited for before the next is asked for.
template <class T, int N>
struct Packed {
  uint32_t words[N * sizeof(T) / 4];
};

template <class T, int N>
__device__ __forceinline__ void put(Packed<T, N>* to, int j, T value) {
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (j % 2 == 0) to->words[j / 2] = 0;
    to->words[j / 2] |= uint32_t{bits} << (j % 2 * 16);
  } else {
    memcpy(to->words + j * sizeof(T) / 4, &value, sizeof value);
  }
}

template <int N>
__device__ __forceinline__ float element(const Packed<float, N>& from, int j) {
  return __uint_as_float(from.words[j]);
}
template <int N>
__device__ __forceinline__ double element(const Packed<double, N>& from, int j) {
  double value;
  memcpy(&value, from.words + 2 * j, sizeof value);
  return value;
}
template <int N>
__device__ __forceinline__ float element(const Packed<bf16, N>& from, int j) {
  const uint32_t pair = from.words[j / 2];
  return __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
}
template <int N>
__device__ __forceinline__ float element(const Packed<f16, N>& from, int j) {
  __half2 pair;
  memcpy(&pair, &from.words[j / 2], sizeof pair);
  return j % 2 == 0 ? __low2float(pair) : __high2float(pair);
}

template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_whole(const T* p) {
  constexpr int kWords = kVectorBytes / 4;
  Packed<T, N> to;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(to.words)) / 4; i += kWords) {
    const auto vector = load_vector<uint32_t, kWords>(reinterpret_cast<const uint32_t*>(p) + i);
#pragma unroll
    for (int j = 0; j < kWords; ++j) to.words[i + j] = vector.at[j];
  }
  return to;
}

// The elements of a piece, `fill` around them. aligned: row + piece.first is, as a vector.
template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_piece(const T* row, const Piece& piece, bool aligned,
                                                   T fill) {
  const T* p = row + piece.first;
  const bool whole = piece.begin == 0 && piece.end == N;
  if (whole && aligned) return load_whole<N>(p);
  Packed<T, N> to;
  if (whole) {
#pragma unroll
    for (int j = 0; j < N; ++j) put(&to, j, p[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) put(&to, j, piece.has(j) ? p[j] : fill);
  }
  return to;
}

// Two halves side by side, by the one instruction that rounds both.
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, f16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Rounds the elements of a piece, which lies at a vector's boundary, and stores them.
template <int N, class T, class A>
__device__ __forceinline__ void store_piece(T* row, const Piece& piece,
                                            const Elements<A, N>& from) {
  T* p = row + piece.first;
  if (piece.begin != 0 || piece.end != N) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (piece.has(j)) p[j] = Rounded<T>::from(from.at[j]);
    }
  } else {
    uint4 words;
    if constexpr (sizeof(T) == 2) {
      words = {rounded_pair(from.at[0], from.at[1], T()), rounded_pair(from.at[2], from.at[3], T()),
               rounded_pair(from.at[4], from.at[5], T()),
               rounded_pair(from.at[6], from.at[7], T())};
    } else {
      static_assert(sizeof(from) == kVectorBytes);
      memcpy(&words, &from, kVectorBytes);
    }
    __stcg(reinterpret_cast<uint4*>(p), words);  // a plain store nvcc takes apart
  }
}

// The calling thread's share of a row, kUnroll pieces of N elements at a time:
// `load(piece, fast)` gives what use(pieces, items) gets of each; fast: the piece is whole, and the
// row is aligned. The first piece begins `lead` elements before the row, so that a boundary lies
// where it should.
template <int N, class Load, class Use>
__device__ __forceinline__ void for_each_batch(int64_t columns, int lead, bool aligned,
                                               const Team& team, const Load& load, const Use& use) {
  using Item = decltype(load(Piece{}, true));
  const int64_t step = team.threads * N;
  for (int64_t first = team.thread * N - lead; first < columns; first += kUnroll * step) {
    Piece pieces[kUnroll];
    Item items[kUnroll];
    if (aligned && first >= 0 && first + (kUnroll - 1) * step + N <= columns) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        pieces[u] = {first + u * step, 0, N};
        items[u] = load(pieces[u], true);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = first + u * step, left = columns - at;
        pieces[u] = {at, at < 0 ? static_cast<int>(-at) : 0,
                     left < N ? static_cast<int>(left < 0 ? 0 : left) : N};
        items[u] = load(pieces[u], false);
      }
    }
    use(pieces, items);
  }
}

// How many elements `row` lies behind a vector's boundary.
template <class T>
__device__ __forceinline__ int lead_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
}

// --- Gradients ----------------------------------------------------------------------------------

// rows.write(i, team): a thread's share of the gradient of row i, 2^shift threads of a block and
// gridDim.y blocks having a row.
template <class G>
__global__ void __launch_bounds__(kRowThreads)
    gradient_kernel(KSAM_PARAMETER(G) gradients, int64_t rows, int shift) {
  const int64_t per_block = kRowThreads >> shift, threads = int64_t{1} << shift;
  const Team team{blockIdx.y * threads + (threadIdx.x & (threads - 1)), gridDim.y * threads};
  for (int64_t i = blockIdx.x * per_block + (threadIdx.x >> shift); i < rows;
       i += gridDim.x * per_block) {
    gradients.write(i, team);
  }
}

// Rows of a grid for a gradient, in which nothing is added up over a row: one turn of kUnroll
// vectors is enough work for a thread.
inline RowPlan plan_gradient(int64_t rows, int64_t columns, int per_vector) {
  const int64_t turns = (columns + per_vector * kUnroll - 1) / (per_vector * kUnroll) + 1;
  const int needed = log2_ceil(turns);
  const int shift = needed < kRowShift ? needed : kRowShift;
  const int per_block = kRowThreads >> shift;
  const unsigned x = row_blocks((rows + per_block - 1) / per_block);
  const int64_t worth = (turns + kRowThreads - 1) / kRowThreads;
  const int64_t room = int64_t{row_blocks(INT64_MAX)} / x;
  const int64_t parts = worth < room ? worth : room;
  return {shift, dim3(x, static_cast<unsigned>(parts > 1 ? parts : 1))};
}

template <class G>
void launch_gradient(const G& gradients, int64_t rows, int64_t columns, int per_vector,
                     Stream stream) {
  const RowPlan plan = plan_gradient(rows, columns, per_vector);
  launch(gradient_kernel<G>, plan.grid, kRowThreads, stream, gradients, rows, plan.shift);
}

// --- Reductions ---------------------------------------------------------------------------------
//
// A reduction has
//   struct Sums               what is added up over a row; at first, what no element gives
//   struct Row; row(i)        what is known of row i beforehand
//   add(row, team, &sums)     the share of a thread
//   merge(&sums, other)       two shares as one; neither order nor grouping follows from timing
//   from_lane(sums, by)       the sums of the lane whose number differs in the bits `by`
//   load(p)                   sums that another block has written
//   finish(row, sums)         writes the row's result

// Whether `row` is one's own, and its sums over 2^shift lanes, in all of them.
template <class R>
__device__ __forceinline__ void merge_lanes(int shift, typename R::Sums* sums) {
  for (int by = 1 << shift >> 1; by > 0; by /= 2) R::merge(sums, R::from_lane(*sums, by));
}

// finish() for rows first, first + 1 ... of 2^shift lanes each, then `warps` warps further;
// add(i, row, lane, &sums) adds a lane's share of row i.
template <class R, class Add>
__device__ __forceinline__ void rows_by_lanes(const R& reduction, int64_t rows, int shift,
                                              int64_t warp, int64_t warps, const Add& add) {
  const int per_warp = kWarp >> shift;
  const int lane = lane_of_thread() & ((1 << shift) - 1);
  for (int64_t base = warp * per_warp; base < rows; base += warps * per_warp) {
    const int64_t i = base + (lane_of_thread() >> shift);
    typename R::Sums sums{};
    typename R::Row row{};
    if (i < rows) {
      row = reduction.row(i);
      add(i, row, lane, &sums);
    }
    merge_lanes<R>(shift, &sums);
    if (i < rows && lane == 0) reduction.finish(row, sums);
  }
}

// The sums of all threads of the block, in the first.
template <class R>
__device__ typename R::Sums merge_block(typename R::Sums sums) {
  __shared__ typename R::Sums of_warp[kRowThreads / kWarp];
  merge_lanes<R>(5, &sums);
  __syncthreads();  // the row before this one has been read
  if (lane_of_thread() == 0) of_warp[warp_of_thread()] = sums;
  __syncthreads();
  if (warp_of_thread() == 0) {
    sums = of_warp[lane_of_thread() % (kRowThreads / kWarp)];
    merge_lanes<R>(kRowShift - 5, &sums);
  }
  return sums;
}

// Where the blocks of a split row leave their sums, and the counter of those that have.
template <class Sums>
struct SplitRows {
  Sums* partial;  // [rows, gridDim.y]
  unsigned* ticket;
};

// Short rows.
template <class R, class Tail>
__global__ void __launch_bounds__(kRowThreads)
    lanes_kernel(KSAM_PARAMETER(R) reduction, int64_t rows, int shift, KSAM_PARAMETER(Tail) tail) {
  constexpr int kWarps = kRowThreads / kWarp;
  rows_by_lanes(reduction, rows, shift, int64_t{blockIdx.x} * kWarps + warp_of_thread(),
                int64_t{gridDim.x} * kWarps, [&](int64_t, const auto& row, int lane, auto* sums) {
                  reduction.add(row, Team{lane, int64_t{1} << shift}, sums);
                });
  if (tail.is_wanted() && last_block(tail.ticket, gridDim.x)) tail.run();
}

// Long rows. The last of all blocks puts the parts of split rows together.
template <class R, class Tail>
__global__ void __launch_bounds__(kRowThreads)
    blocks_kernel(KSAM_PARAMETER(R) reduction, int64_t rows, SplitRows<typename R::Sums> split,
                  KSAM_PARAMETER(Tail) tail) {
  const int64_t parts = gridDim.y;
  const Team team{int64_t{blockIdx.y} * kRowThreads + threadIdx.x, parts * kRowThreads};
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const auto row = reduction.row(i);
    typename R::Sums sums{};
    reduction.add(row, team, &sums);
    sums = merge_block<R>(sums);
    if (threadIdx.x == 0) {
      if (parts == 1) {
        reduction.finish(row, sums);
      } else {
        split.partial[i * parts + blockIdx.y] = sums;
      }
    }
  }
  if (parts == 1 && !tail.is_wanted()) return;
  if (!last_block(split.ticket, gridDim.x * gridDim.y)) return;
  if (parts > 1) {
    int shift = 0;
    while (shift < 5 && 1 << shift < parts) ++shift;
    rows_by_lanes(reduction, rows, shift, warp_of_thread(), kRowThreads / kWarp,
                  [&](int64_t i, const auto&, int lane, auto* sums) {
                    for (int64_t part = lane; part < parts; part += 1 << shift) {
                      R::merge(sums, R::load(split.partial + i * parts + part));
                    }
                  });
    __syncthreads();
  }
  if (tail.is_wanted()) tail.run();
}

struct NoTail {
  unsigned* ticket;
  __device__ __forceinline__ bool is_wanted() const { return false; }
  __device__ __forceinline__ void run() const {}
};

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
  SplitRows<Sums> split{nullptr, nullptr};
  if (has_tail || plan.is_split()) {
    split.ticket = tail.ticket = ticket(stream, scratch);
    split.partial = reinterpret_cast<Sums*>(static_cast<char*>(scratch) + kTicketRoom);
  }
  if (plan.by_block()) {
    launch(blocks_kernel<R, Tail>, plan.grid, kRowThreads, stream, reduction, rows, split, tail);
  } else {
    launch(lanes_kernel<R, Tail>, plan.grid, kRowThreads, stream, reduction, rows, plan.shift,
           tail);
  }
}

}  // namespace ksam::gpu
