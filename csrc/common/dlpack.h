// The part of DLPack's C ABI (version 1) that reads a Python tensor without a copy or a reference.
//
// torch.Tensor.__dlpack_c_exchange_api__ is a capsule holding an ExchangeApi. Through it this
// extension sees torch tensors in some 70 ns each and needs nothing of torch to compile: one build
// serves every torch that has the capsule. Layouts: dlpack.h of github.com/dmlc/dlpack, v1.3.
#pragma once

#include <cstdint>

namespace ksam::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kROCm = 10 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  // A new tensor of the prototype's device, dtype and shape; 0, or -1 after a call of set_error.
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensor** out, void* error_context,
                                  SetError set_error);
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace ksam::dlpack
