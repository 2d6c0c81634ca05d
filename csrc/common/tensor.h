// A tensor as the kernels see it: borrowed memory, a dtype, a shape.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ksam {

// Floating ones first: is_floating(), perturb/table.cuh and triton_table.py count on the order.
enum class DType : int8_t { f32, f64, bf16, f16, i32, i64, other };

__attribute__((always_inline)) constexpr bool is_floating(DType dtype) {
  return dtype <= DType::f16;
}

// Bytes of a number of a floating dtype.
KSAM_FORMULA constexpr int size_of(DType dtype) {
  if (dtype == DType::f64) return 8;
  return dtype == DType::f32 ? 4 : 2;
}

// The type of the arithmetic on elements of type T.
template <class T>
struct OpmathOf {
  using type = float;
};
template <>
struct OpmathOf<double> {
  using type = double;
};
template <class T>
using Opmath = typename OpmathOf<T>::type;

// Hands a type to a generic lambda, as typename decltype(argument)::type.
template <class T>
struct Type {
  using type = T;
};

// Borrowed: shape and strides point into the torch tensor, which must outlive the view.
struct Tensor {
  char* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int64_t numel = 0;
  int32_t ndim = 0;
  int32_t itemsize = 0;
  int32_t device_type = 0;  // dlpack::DeviceType
  int32_t device_id = 0;
  DType dtype = DType::other;

  template <class T>
  KSAM_FORMULA T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

// Strides of dimensions of size 1 say nothing about the layout.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int i = 0; i < a.ndim; ++i) {
    if (a.strides[i] != b.strides[i] && a.shape[i] > 1) return false;
  }
  return true;
}

inline bool is_contiguous(const Tensor& t) {
  if (t.numel == 0) return true;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

}  // namespace ksam
