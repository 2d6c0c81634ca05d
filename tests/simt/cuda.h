// What kernel sources see of CUDA when a plain C++ compiler reads them for the runner.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <algorithm>
#include <tuple>

#include "dim3.h"
#include "memory.h"
#include "runner.h"

#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
// One copy in a section of its own: the runner brings each block's bytes into place.
#define __shared__ static __attribute__((section("simt_shared")))
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

// Default arguments are evaluated where the function is called.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE \
  simt::Site { file, line }

// --- Barriers and warps -------------------------------------------------------------------------

inline void __syncthreads(SIMT_HERE) { simt::block_barrier(simt::Vote::count, false, SIMT_SITE); }
inline int __syncthreads_count(int p, SIMT_HERE) {
  return simt::block_barrier(simt::Vote::count, p != 0, SIMT_SITE);
}
inline int __syncthreads_or(int p, SIMT_HERE) {
  return simt::block_barrier(simt::Vote::any, p != 0, SIMT_SITE);
}
inline int __syncthreads_and(int p, SIMT_HERE) {
  return simt::block_barrier(simt::Vote::all, p != 0, SIMT_SITE);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  simt::warp_operation(simt::WarpOp::sync, mask, 0, 0, SIMT_SITE);
}
inline void __threadfence() { simt::fence(); }
inline void __nanosleep(unsigned) { simt::yield(); }

namespace simt {

template <class T>
uint64_t widened(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffled(unsigned mask, T value, int source, Site site) {
  const uint64_t bits = warp_operation(WarpOp::shuffle, mask, widened(value), source, site);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// The lane that a shuffle reads: `lane` where that is in the group of `width`, else its own.
inline int in_group(int from, int to, int width) { return to / width == from / width ? to : from; }

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  const int base = simt::lane() / width * width;
  return simt::shuffled(mask, value, base + source % width, SIMT_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_HERE) {
  const int lane = simt::lane(), to = lane + static_cast<int>(by);
  return simt::shuffled(mask, value, simt::in_group(lane, to, width), SIMT_SITE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_HERE) {
  const int lane = simt::lane(), to = lane - static_cast<int>(by);
  return simt::shuffled(mask, value, to < 0 ? lane : simt::in_group(lane, to, width), SIMT_SITE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, SIMT_HERE) {
  const int lane = simt::lane();
  return simt::shuffled(mask, value, simt::in_group(lane, lane ^ with, width), SIMT_SITE);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) {
  return static_cast<unsigned>(
      simt::warp_operation(simt::WarpOp::ballot, mask, p != 0, 0, SIMT_SITE));
}
inline int __any_sync(unsigned mask, int p, SIMT_HERE) {
  return __ballot_sync(mask, p, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, SIMT_HERE) {
  return __ballot_sync(mask, !p, file, line) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_HERE) {
  return static_cast<unsigned>(
      simt::warp_operation(simt::WarpOp::match, mask, simt::widened(value), 0, SIMT_SITE));
}
inline int __reduce_add_sync(unsigned mask, int value, SIMT_HERE) {
  return static_cast<int>(
      simt::warp_operation(simt::WarpOp::add, mask, simt::widened(value), 0, SIMT_SITE));
}

// --- Arithmetic ---------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
using std::max;
using std::min;

// --- Launches and the runtime -------------------------------------------------------------------

namespace cooperative_groups {
struct grid_group {
  void sync(SIMT_HERE) const { simt::grid_barrier(SIMT_SITE); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

namespace simt {

template <class... P, class... A>
void launch(bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block, A&&... arguments) {
  const std::tuple<std::decay_t<P>...> values(static_cast<P>(arguments)...);
  run(grid, block, cooperative,
      [&] { std::apply([&](const auto&... value) { kernel(value...); }, values); });
}

}  // namespace simt
