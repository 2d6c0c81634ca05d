// Launches, for nvcc and for the runner of tests/simt.
#pragma once

#include <atomic>

#if defined(KSAM_SIMT)
#include "cuda.h"  // tests/simt/cuda.h
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#endif

#include "common/gpu_runtime.h"

// A struct as a kernel's parameter, read where the launch has put it.
// KSAM_DEVICE_ASSERT(condition): ends the kernel with an error that the host sees at its next wait.
// KSAM_CHECK_ALIGNED(p, bytes): in the runner, what a GPU does where a vector's address is no
// multiple of its size.
#if defined(KSAM_SIMT)
#define KSAM_PARAMETER(T) const T&
#define KSAM_CHECK_ALIGNED(p, bytes)             \
  (reinterpret_cast<uintptr_t>(p) % (bytes) == 0 \
       ? (void)0                                 \
       : simt::fail("misaligned address", {__FILE__, __LINE__}))
#define KSAM_DEVICE_ASSERT(condition) \
  ((condition) ? (void)0 : simt::fail("device-side assert: " #condition, {__FILE__, __LINE__}))
#else
#define KSAM_PARAMETER(T) const __grid_constant__ T
#define KSAM_CHECK_ALIGNED(p, bytes) ((void)0)
#define KSAM_DEVICE_ASSERT(condition) \
  ((condition) ? (void)0 : __assert_fail(#condition, __FILE__, __LINE__, __func__))
#endif

namespace ksam::gpu {

// Bytes of parameters that one launch can carry (CUDA C++ Programming Guide, "Function
// Parameters").
#if defined(KSAM_SIMT)
constexpr int kParameterBytes = 2048;  // so that tests reach the next launch sooner
#elif CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;
#else
constexpr int kParameterBytes = 4096;
#endif

#if defined(KSAM_SIMT)

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, Stream, A&&... arguments) {
  simt::launch(false, kernel, grid, block, arguments...);
}

template <class... Kernels>
void load(Kernels...) {}

template <class... P, class... A>
bool launch_at_once(void (*kernel)(P...), dim3 grid, dim3 block, Stream, A&&... arguments) {
  static uint64_t launches = 0;  // every other one has room for two blocks
  if (grid.x > 2 && ++launches % 2 == 0) return false;
  simt::launch(true, kernel, grid, block, arguments...);
  return true;
}

#else

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  const std::string message = std::string("CUDA: ") + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw std::runtime_error(message);
}

// The type of a parameter, by the kernel alone: arguments of other types are converted. By
// reference, so that a table is copied once, by the runtime.
template <class P>
struct NonDeduced {
  using type = const P&;
};

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, Stream stream,
            typename NonDeduced<P>::type... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, 0, stream));
}

// CUDA loads a kernel when it is first asked for, and may find the current device full. For those
// of a call that must not end between two launches: loads them, or throws.
template <class... Kernels>
void load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  (check(cudaFuncGetAttributes(&attributes, kernels)), ...);
}

// False, with nothing launched, where several blocks have no room at once; throws where even one
// has none.
template <class... P>
bool launch_at_once(void (*kernel)(P...), dim3 grid, dim3 block, Stream stream,
                    typename NonDeduced<P>::type... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const cudaError_t error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid,
                                                        block, addresses, 0, stream);
  if (error == cudaErrorCooperativeLaunchTooLarge && grid.x > 1) {
    cudaGetLastError();  // told by the result: this runtime need not remember it
    return false;
  }
  check(error);
  return true;
}

#endif

// What `find`, a lambda, says of a device, asked once for each: its type has answers of its own.
template <class T, class Find>
T once_per_device(int device, const Find& find) {
  static_assert(std::is_class_v<Find>, "functions of one type would share their answers");
  constexpr int kDevices = 64;
  static std::atomic<T> known[kDevices];  // T() where it is not
  if (device < kDevices && known[device] != T()) return known[device];
  const T found = find(device);
  if (device < kDevices) known[device] = found;
  return found;
}

// All blocks run at once; cooperative_groups' grid.sync() works in them. They are fewer than asked
// for where the device has no room for so many: a green context has some of its multiprocessors.
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, Stream stream,
                        A&&... arguments) {
  while (!launch_at_once(kernel, grid, block, stream, arguments...)) grid.x = (grid.x + 1) / 2;
}

}  // namespace ksam::gpu
