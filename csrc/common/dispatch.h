// Calls a generic lambda with the type of a tensor's elements. For the <room>_cpu.cpp files; CUDA
// kernels have on_floating() of common/block.cuh.
#pragma once

#include "common/simd.h"
#include "common/tensor.h"

namespace ksam::KSAM_ISA {

// body(Type<T>{}), T being the element type of a floating dtype.
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
