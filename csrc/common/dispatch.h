// From a tensor's dtype to the type of its elements, in the <room>_cpu.cpp files.
#pragma once

#include "common/simd.h"
#include "common/tensor.h"

namespace ksam::KSAM_ISA {

// body(Type<T>{}) with T the element type of a floating dtype.
template <class Body>
KSAM_INLINE void on_floating(DType dtype, const Body& body) {
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
      __builtin_unreachable();  // the bindings decline every other dtype
  }
}

}  // namespace ksam::KSAM_ISA
