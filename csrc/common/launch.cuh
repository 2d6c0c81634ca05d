// What nvcc and the runner of tests/simt each do in their own way: launches, parameters of kernels,
// the sizes of constants.
#pragma once

#include <atomic>
#include <type_traits>

#if defined(KSAM_SIMT)
#include "cuda.h"  // tests/simt/cuda.h
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#include "common/gpu_runtime.h"

// KSAM_PARAMETER(T): a struct as a kernel's parameter, which is read where the launch has put it; a
// plain one would be copied to each thread's local memory where the kernel indexes into it.
// KSAM_DEVICE_ASSERT(condition): ends the kernel with an error that the host sees at its next wait.
// KSAM_CHECK_ALIGNED(p, bytes): makes the runner fail, as a GPU does, if a vector's address is not
// a multiple of its size.
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

// A constant with another value in the runner of tests/simt, so that the tests' small inputs take
// every path that large inputs take on a GPU.
constexpr int gpu_or_simt([[maybe_unused]] int on_gpu, [[maybe_unused]] int in_simt) {
#if defined(KSAM_SIMT)
  return in_simt;
#else
  return on_gpu;
#endif
}

// Bytes of parameters that one launch can carry (CUDA C++ Programming Guide, "Function
// Parameters").
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kParameterBytes = gpu_or_simt(32764, 2048);
#else
constexpr int kParameterBytes = gpu_or_simt(4096, 2048);
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
  static uint64_t launches = 0;  // every other one finds a GPU that has room for two blocks
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

// The type of a parameter, deduced from the kernel alone: arguments of other types are converted.
// A reference, so that only the runtime copies a table.
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

// Loads kernels, or throws. CUDA would load each at its first launch and may find the device's
// memory full: too late for a call that must not fail between two of its launches.
template <class... Kernels>
void load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  (check(cudaFuncGetAttributes(&attributes, kernels)), ...);
}

// False, with nothing launched, where the device cannot run so many blocks at once; throws where it
// cannot even run one.
template <class... P>
bool launch_at_once(void (*kernel)(P...), dim3 grid, dim3 block, Stream stream,
                    typename NonDeduced<P>::type... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const cudaError_t error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid,
                                                        block, addresses, 0, stream);
  if (error == cudaErrorCooperativeLaunchTooLarge && grid.x > 1) {
    cudaGetLastError();  // forget the error: the result reports it
    return false;
  }
  check(error);
  return true;
}

#endif

// find(device), called once for each device. Answers are stored per type of `find`, so it has to be
// a lambda: each has a type of its own.
template <class T, class Find>
T once_per_device(int device, const Find& find) {
  static_assert(std::is_class_v<Find>, "functions of one type would share their answers");
  constexpr int kDevices = 64;
  static std::atomic<T> known[kDevices];  // T(): not yet
  if (device < kDevices && known[device] != T()) return known[device];
  const T found = find(device);
  if (device < kDevices) known[device] = found;
  return found;
}

// Launches blocks that all run at once, so that cooperative_groups' grid.sync() works in them.
// There are fewer blocks than asked for where that many do not fit: a green context, for example,
// has only some of the device's multiprocessors.
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, Stream stream,
                        A&&... arguments) {
  while (!launch_at_once(kernel, grid, block, stream, arguments...)) grid.x = (grid.x + 1) / 2;
}

}  // namespace ksam::gpu
