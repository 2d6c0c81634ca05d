// Compact: the chosen rows of every tensor of a batch, moved as bytes.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/tensor.h"

namespace ksam {

// One tensor of the batch: its rows are blocks of bytes, wherever each of them begins.
struct Leaf {
  const char* source;     // [B] rows
  int64_t source_stride;  // bytes from one row to the next; 0 where all samples share one
  char* out;              // [k] rows without gaps
  int64_t row_bytes;
};

// Whether all of indices [k], int32 or int64, any stride, are in [0, rows).
bool in_range(const Tensor& indices, int64_t rows);

// out[i] = source[indices[i]] for every leaf; indices [k] as above, each in [0, B); k >= 0.
void gather_rows(const Leaf* leaves, int64_t leaf_count, const Tensor& indices);

KSAM_DECLARE_GPU(
    // The same in device memory, for leaves with bytes to copy and k > 0. An index out of [0, rows)
    // fails a device-side assertion: to look at the indices, the host would have to wait for them.
    void gather_rows(const Leaf* leaves, int64_t leaf_count, const Tensor& indices, int64_t rows,
                     Stream stream);)

}  // namespace ksam
