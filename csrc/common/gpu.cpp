// The part of gpu.h that gets streams and memory from torch, through its DLPack capsule.
#include "common/gpu.h"

#include <string>

#include "common/gpu_runtime.h"
#include "common/python.h"

namespace ksam {

#if defined(KSAM_CUDA)

bool has_kernels(const Tensor& t) {
  return on_cpu(t) || (on_gpu(t) && gpu::has_code_for(t.device_id));
}

DeviceGuard::DeviceGuard(int device) : previous_(gpu::set_device(device)) {}
DeviceGuard::~DeviceGuard() { gpu::return_to_device(previous_); }

GpuCall::GpuCall(const Tensor& t) : device_{t.device_type, t.device_id}, guard_(device_.id) {
  void* stream = nullptr;
  if (torch_api().current_work_stream(device_.type, device_.id, &stream) != 0) {
    throw pybind11::error_already_set();
  }
  stream_ = static_cast<Stream>(stream);
}

GpuCall::~GpuCall() {
  if (scratch_ != nullptr) scratch_->deleter(scratch_);
}

void* GpuCall::scratch(int64_t bytes) {
  if (bytes == 0) return nullptr;
  if (scratch_ != nullptr) throw std::logic_error("a second piece of scratch memory");
  int64_t shape[] = {bytes};
  dlpack::Tensor prototype{};
  prototype.device = device_;
  prototype.ndim = 1;
  prototype.dtype = {dlpack::kUInt, 8, 1};
  prototype.shape = shape;
  std::string error;
  const auto set_error = [](void* context, const char*, const char* message) {
    *static_cast<std::string*>(context) = message;
  };
  if (torch_api().managed_tensor_allocator(&prototype, &scratch_, &error, set_error) != 0) {
    scratch_ = nullptr;
    error = "cannot allocate " + std::to_string(bytes) + " bytes of device memory: " + error;
    // The words of torch's allocators for GPUs and, in the runner of tests/simt, for the CPU.
    for (const char* words : {"out of memory", "can't allocate memory"}) {
      if (error.find(words) != std::string::npos) throw OutOfMemory(error);
    }
    throw std::runtime_error(error);
  }
  return static_cast<char*>(scratch_->tensor.data) + scratch_->tensor.byte_offset;
}

#else

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;
GpuCall::GpuCall(const Tensor&) : device_{}, guard_(0) { NotBuilt::call(); }
GpuCall::~GpuCall() = default;
void* GpuCall::scratch(int64_t bytes) { return NotBuilt::call(bytes); }

#endif

}  // namespace ksam
