// Top-k: indices of the k largest losses, ascending. Of equal losses, those of the lowest indices
// are taken. NaN counts as the largest, and -0 as equal to +0.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/isa.h"
#include "common/tensor.h"

namespace ksam {

// Keys are read in whole blocks of this many.
constexpr int kTopkBlock = 64;

// n rounded up to whole blocks.
KSAM_FORMULA int64_t topk_padded(int64_t n) {
  return (n + kTopkBlock - 1) / kTopkBlock * kTopkBlock;
}

// Bytes of scratch that topk_indices needs for n losses: their keys, and the candidates among them.
KSAM_FORMULA int64_t topk_scratch_bytes(DType dtype, int64_t n) {
  return 2 * topk_padded(n) * (dtype == DType::f64 ? 8 : 4);
}

// losses [n], floating, any stride; out [k]; 1 <= k <= n < 2^32.
KSAM_DECLARE_PER_ISA(void topk_indices(const Tensor& losses, int64_t k, void* scratch,
                                       int64_t* out);)

KSAM_DECLARE_GPU(
    // Bytes of device memory that topk_indices needs for n losses; 0 where one block selects.
    int64_t topk_scratch_bytes(int64_t n);
    // The same, in device memory; losses contiguous.
    void topk_indices(const Tensor& losses, int64_t k, void* scratch, int64_t* out, Stream stream);)

}  // namespace ksam
