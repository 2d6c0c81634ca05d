// Strides of rows whose operands differ in memory order, as GPU kernels walk them.
#pragma once

#include "perturb/perturb.h"

namespace ksam {

constexpr int kMaxDims = 12;  // after merging those that form one in all operands

template <int N>
struct Layout {
  int64_t shape[kMaxDims];       // the innermost dimension first
  int64_t strides[N][kMaxDims];  // in elements
  int32_t ndim = 0;

  // Whether `above`, the next dimension outwards, continues the outermost one in every operand.
  bool continues(const int64_t (&above)[N]) const {
    if (ndim == 0) return false;
    for (int i = 0; i < N; ++i) {
      if (above[i] != strides[i][ndim - 1] * shape[ndim - 1]) return false;
    }
    return true;
  }

  // Adds the next dimension outwards; false where there are kMaxDims already.
  bool add(int64_t size, const int64_t (&above)[N]) {
    if (size == 1) return true;
    if (continues(above)) {
      shape[ndim - 1] *= size;
      return true;
    }
    if (ndim == kMaxDims) return false;
    shape[ndim] = size;
    for (int i = 0; i < N; ++i) strides[i][ndim] = above[i];
    ++ndim;
    return true;
  }
};

// The layout of the first N operands of a row; false where it has more than kMaxDims dimensions.
template <int N, int M>
bool lay_out(const Row<M>& row, Layout<N>* out) {
  static_assert(N <= M, "a row has all operands of its formula");
  int64_t strides[N];
  if (row.operand[0].strides == nullptr) {  // in memory order
    for (int64_t& stride : strides) stride = 1;
    return out->add(row.numel, strides);
  }
  for (int d = row.operand[0].ndim - 1; d >= 0; --d) {
    for (int i = 0; i < N; ++i) {
      const int64_t* of_operand = row.operand[i].strides;
      strides[i] = of_operand == nullptr ? 0 : of_operand[d];
    }
    if (!out->add(row.operand[0].shape[d], strides)) return false;
  }
  return true;
}

}  // namespace ksam
