// The part of DLPack's C ABI (version 1) that reads a Python tensor without a copy or a reference.
//
// torch.Tensor.__dlpack_c_exchange_api__ is a capsule holding an ExchangeApi. Through it this
// extension sees torch tensors in some 70 ns each and needs nothing of torch to compile: one build
// serves every torch that has the capsule. Layouts: dlpack.h of github.com/dmlc/dlpack, v1.3.
#pragma once

#include <cstdint>

namespace ksam::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
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

struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace ksam::dlpack
