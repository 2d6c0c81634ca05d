// Indices of the k largest losses, by one block or by a grid of them.
//
// Launches: 1. Bytes moved: the losses are read once and 8 k are written. Losses beyond those that
// threads hold in registers are read another 5 times (double: 9), from the cache.
#include <algorithm>

#include "topk/select.cuh"
#include "topk/topk.h"

namespace ksam::gpu {
namespace {

constexpr int kBlockThreads = 1024;  // at most, of a block that works alone
constexpr int kGridThreads = 512;    // of a block of a grid

// Up to this many losses, one block is faster than a grid, whose blocks wait for each other.
constexpr int64_t kOneBlock = gpu_or_simt(12288, 1500);
// Fewer losses than this are not worth one more block of a grid.
constexpr int64_t kPerGridBlock = gpu_or_simt(4 * kGridThreads, 700);
// Keys that a thread holds in registers: 64 bytes of them.
template <class T>
constexpr int kHeld = gpu_or_simt(64 / static_cast<int>(sizeof(KeyOf<T>)), 2);
// A thread of a block that works alone never has more keys than this, nor registers to spare.
template <class T>
constexpr int kHeldByBlock =
    std::min(kHeld<T>, gpu_or_simt(static_cast<int>(kOneBlock / kBlockThreads), 2));

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    select_kernel(const T* __restrict__ losses,  // [n]
                  int64_t n, int64_t k,
                  int64_t* __restrict__ out) {  // [k]
  __shared__ SelectShared shared;
  select_by_block<kHeldByBlock<T>>(losses, n, k, shared, out);
}

// Scratch of select_grid_kernel.
struct GridScratch {
  uint32_t* count;   // [passes, kDigits]
  Counts* selected;  // [blocks]
};

// How many keys the blocks before this one have selected.
__device__ Counts selected_before(const Counts* selected) {
  __shared__ Counts sum;
  if (warp_of_thread() == 0) {
    Counts own{0, 0};
    for (unsigned b = lane_of_thread(); b < blockIdx.x; b += kWarp) {
      own.greater += __ldcg(&selected[b].greater);
      own.equal += __ldcg(&selected[b].equal);
    }
    own = {warp_sum(own.greater), warp_sum(own.equal)};
    if (lane_of_thread() == 0) sum = own;
  }
  __syncthreads();
  return sum;
}

// All blocks run at once (a cooperative launch). They add up their counts of a digit in global
// memory; each of them then finds the same digit.
template <class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    select_grid_kernel(const T* __restrict__ losses,  // [n]
                       int64_t n, int64_t k, GridScratch scratch,
                       int64_t* __restrict__ out) {  // [k]
  using Key = KeyOf<T>;
  __shared__ SelectShared shared;
  const auto grid = cooperative_groups::this_grid();
  const int64_t per_block = (n + gridDim.x - 1) / gridDim.x;
  const int64_t begin = per_block * blockIdx.x < n ? per_block * blockIdx.x : n;
  const Stretch<T, kHeld<T>> stretch(
      {losses, begin, begin + per_block < n ? begin + per_block : n});
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (unsigned i = thread; i < kPasses<Key> * kDigits; i += gridDim.x * blockDim.x) {
    scratch.count[i] = 0;
  }
  grid.sync();
  Threshold<Key> at{0, 0, k};
  uint32_t* count = scratch.count;
  for (int shift = kFirstShift<Key>; shift >= 0; shift -= kDigitBits, count += kDigits) {
    count_digits(stretch, at, shift, shared);
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) {
      if (shared.count[d] != 0) atomicAdd(&count[d], shared.count[d]);
    }
    grid.sync();
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) shared.count[d] = __ldcg(&count[d]);
    __syncthreads();
    find_digit(at.wanted, shared);
    if (narrow(&at, shift, shared)) break;
  }
  const Selected selected = count_selected(stretch, at, shared);
  if (threadIdx.x == 0) scratch.selected[blockIdx.x] = selected.all;
  grid.sync();
  const Counts before = selected_before(scratch.selected);
  write_selected(
      stretch, at,
      Counts{before.greater + selected.before.greater, before.equal + selected.before.equal}, out);
}

constexpr int64_t kCountBytes = sizeof(uint32_t) * kDigits;

// As few threads as will have about kEach losses each: the barriers of a small block are quicker.
unsigned block_threads(int64_t n) {
  constexpr int64_t kFewest = 256, kEach = 8;
  int64_t threads = kFewest;
  while (threads < kBlockThreads && threads * kEach < n) threads *= 2;
  return static_cast<unsigned>(threads);
}

unsigned grid_blocks(int64_t n) {
  const int64_t worth = (n + kPerGridBlock - 1) / kPerGridBlock;
  return static_cast<unsigned>(worth < multiprocessors() ? worth : multiprocessors());
}

}  // namespace

int64_t topk_scratch_bytes(int64_t n) {
  if (n <= kOneBlock) return 0;
  return kPasses<uint64_t> * kCountBytes + int64_t{grid_blocks(n)} * sizeof(Counts);
}

void topk_indices(const Tensor& losses, int64_t k, void* scratch, int64_t* out, Stream stream) {
  const int64_t n = losses.numel;
  on_floating(losses.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = losses.as<T>();
    if (n <= kOneBlock) {
      launch(select_kernel<T>, 1, block_threads(n), stream, x, n, k, out);
      return;
    }
    auto* count = static_cast<uint32_t*>(scratch);
    const GridScratch parts{count, reinterpret_cast<Counts*>(count + kPasses<uint64_t> * kDigits)};
    launch_cooperative(select_grid_kernel<T>, grid_blocks(n), kGridThreads, stream, x, n, k, parts,
                       out);
  });
}

}  // namespace ksam::gpu
