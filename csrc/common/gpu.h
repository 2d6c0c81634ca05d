// Says where a call's kernels run, and gets them what they need from torch and the driver.
//
// KSAM_CUDA is defined in builds with CUDA kernels, KSAM_SIMT where tests/simt builds the same
// kernels for its runner. The runner executes them on the CPU, so CPU tensors count as on the GPU.
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

// Device memory has run out: torch's allocator has none for scratch, or CUDA has none to load a
// kernel into. Python sees torch.OutOfMemoryError.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Makes a device current for as long as the object lives, then the previous one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// A call whose work goes to torch's current stream of a device. Construct and destroy it with the
// interpreter's lock held, but launch without it: if the stream's queue is full, a launch waits
// until it has moved on.
class GpuCall {
 public:
  explicit GpuCall(const Tensor& t);
  ~GpuCall();
  GpuCall(const GpuCall&) = delete;
  GpuCall& operator=(const GpuCall&) = delete;

  Stream stream() const { return stream_; }

  // Device memory from torch's allocator, aligned to 512 bytes; null for 0 bytes. Only one piece a
  // call. It is freed with this object, even if kernels still use it: torch's allocator hands it
  // out again in stream order.
  void* scratch(int64_t bytes);

 private:
  dlpack::Device device_;
  DeviceGuard guard_;
  Stream stream_ = nullptr;
  dlpack::ManagedTensor* scratch_ = nullptr;
};

// Stands for the result of a kernel that this build leaves out, so that code which calls it
// compiles. has_kernels() keeps such a call from being reached.
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

// KSAM_DECLARE_GPU(declarations): declares functions of namespace gpu, in builds that have them.
// KSAM_ON_GPU(function, arguments...): calls one of them; throws in builds without it.
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
