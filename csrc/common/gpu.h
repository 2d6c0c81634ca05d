// Where the kernels of a call run, and what GPU kernels need from torch and from the driver.
//
// KSAM_CUDA is defined in builds with CUDA kernels. tests/simt builds the same kernels for its
// runner, which executes them on the CPU (KSAM_SIMT): CPU tensors are then what the GPU takes.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/dlpack.h"
#include "common/tensor.h"

struct CUstream_st;

namespace ksam {

using Stream = CUstream_st*;

#if defined(KSAM_SIMT)
inline bool on_cpu(const Tensor&) { return false; }
inline bool on_gpu(const Tensor& t) { return t.device_type == dlpack::kCPU; }
#elif defined(KSAM_CUDA)
inline bool on_cpu(const Tensor& t) { return t.device_type == dlpack::kCPU; }
inline bool on_gpu(const Tensor& t) { return t.device_type == dlpack::kCUDA; }
#else
inline bool on_cpu(const Tensor& t) { return t.device_type == dlpack::kCPU; }
inline bool on_gpu(const Tensor&) { return false; }
#endif

// Whether this build has kernels for the tensor's device.
#if defined(KSAM_CUDA)
bool has_kernels(const Tensor& t);
#else
inline bool has_kernels(const Tensor& t) { return on_cpu(t); }
#endif

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

// Device memory has run out: torch's for scratch, or what CUDA takes for its own to load a kernel.
// In Python it is torch.OutOfMemoryError.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Makes a device the current one, and then what was before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// A call on a device, whose work goes to torch's current stream there. Made and destroyed with the
// interpreter's lock; a launch may wait for room in the stream's queue, so without it in between.
class GpuCall {
 public:
  explicit GpuCall(const Tensor& t);
  ~GpuCall();
  GpuCall(const GpuCall&) = delete;
  GpuCall& operator=(const GpuCall&) = delete;

  Stream stream() const { return stream_; }

  // Device memory from torch's allocator, aligned to 512 bytes, null for no bytes; one piece a
  // call. Freed with this object, which torch's allocator takes as the order of the stream.
  void* scratch(int64_t bytes);

 private:
  dlpack::Device device_;
  DeviceGuard guard_;
  Stream stream_ = nullptr;
  dlpack::ManagedTensor* scratch_ = nullptr;
};

// What a call of a kernel that this build leaves out stands for; has_kernels() prevents it.
struct NotBuilt {
  template <class... Arguments>
  static NotBuilt call(const Arguments&...) {
    throw std::logic_error("a kernel that is not in this build was called");
  }
  template <class Result>
  operator Result() const {
    return Result{};
  }
};

}  // namespace ksam

// KSAM_DECLARE_GPU(declarations): in namespace gpu.
// KSAM_ON_GPU(function, arguments...): calls it, in builds that have it.
#if defined(KSAM_CUDA)
#define KSAM_DECLARE_GPU(...) \
  namespace gpu {             \
  __VA_ARGS__                 \
  }
#define KSAM_ON_GPU(function, ...) gpu::function(__VA_ARGS__)
#else
#define KSAM_DECLARE_GPU(...)
#define KSAM_ON_GPU(function, ...) ::ksam::NotBuilt::call(__VA_ARGS__)
#endif
