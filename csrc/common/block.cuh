// What kernels share: vectors of memory, sums over warps and blocks, the last block of a grid.
#pragma once

#include "common/launch.cuh"
#include "common/tensor.h"

namespace ksam::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;  // of the widest load and store that all architectures have

// --- Element types ------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class A>
__device__ __forceinline__ A to(float x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A to(double x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A to(bf16 x) {
  return static_cast<A>(__bfloat162float(x));
}
template <class A>
__device__ __forceinline__ A to(f16 x) {
  return static_cast<A>(__half2float(x));
}

// Rounded to nearest as torch rounds: a double on its way to 16 bits becomes a float first.
template <class T>
struct Rounded;
template <>
struct Rounded<float> {
  template <class A>
  static __device__ __forceinline__ float from(A x) {
    return static_cast<float>(x);
  }
};
template <>
struct Rounded<double> {
  template <class A>
  static __device__ __forceinline__ double from(A x) {
    return static_cast<double>(x);
  }
};
template <>
struct Rounded<bf16> {
  template <class A>
  static __device__ __forceinline__ bf16 from(A x) {
    return __float2bfloat16_rn(static_cast<float>(x));
  }
};
template <>
struct Rounded<f16> {
  template <class A>
  static __device__ __forceinline__ f16 from(A x) {
    return __float2half_rn(static_cast<float>(x));
  }
};

// body(Type<T>{}), T being the element type of a floating dtype.
template <class Body>
void on_floating(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(Type<float>{});
    case DType::f64:
      return body(Type<double>{});
    case DType::bf16:
      return body(Type<bf16>{});
    case DType::f16:
      return body(Type<f16>{});
    default:
      throw std::logic_error("the bindings decline every other dtype");
  }
}

// --- Memory -------------------------------------------------------------------------------------

// N elements that one instruction loads or stores, at an address that is a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  KSAM_CHECK_ALIGNED(p, sizeof(Vector<T, N>));
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& value) {
  KSAM_CHECK_ALIGNED(p, sizeof(Vector<T, N>));
  *reinterpret_cast<Vector<T, N>*>(p) = value;
}

// --- Warps and blocks ---------------------------------------------------------------------------

__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }

// The sum over a warp, in all its lanes; always added up in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by);
  return value;
}

// The sum over a block of kThreads, in thread 0. Begins with a barrier, so that calls may follow
// each other.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T of_warp[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();
  if (lane_of_thread() == 0) of_warp[warp_of_thread()] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / kWarp; ++w) sum += of_warp[w];
  }
  return sum;
}

// atomicInc that releases what the thread has written, or seen at a barrier, and acquires what the
// threads that counted before it have released.
__device__ __forceinline__ unsigned count_in_order(unsigned* counter, unsigned last) {
#if defined(KSAM_SIMT)
  __threadfence();
  const unsigned before = atomicInc(counter, last);
  __threadfence();
#else  // the block would wait for both fences, with nothing else to do
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
#endif
  return before;
}

// True in the last of `blocks` blocks to get here. That block can read what the others wrote before
// they got here (bypassing the first-level cache: __ldcg), and it leaves the counter at 0 again.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = count_in_order(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  return last;
}

}  // namespace ksam::gpu
