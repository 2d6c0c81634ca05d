// Tensors as the matrices that the kernels of this room take. Each function is false of a tensor
// that lies otherwise.
#pragma once

#include "common/gpu.h"
#include "loss/loss.h"

namespace ksam {

// The first `ndim` dimensions as one, of stride `stride`; false where they have no common stride.
inline bool flatten(const Tensor& t, int ndim, int64_t* size, int64_t* stride) {
  *size = 1;
  *stride = 0;
  bool regular = true;
  for (int i = ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    if (*size == 1) *stride = t.strides[i];
    regular = regular && t.strides[i] == *stride * *size;
    *size *= t.shape[i];
  }
  return regular || *size == 0;
}

// [..., columns] as rows that have unit stride inside.
inline bool as_rows(const Tensor& t, Matrix* rows) {
  if (!has_kernels(t) || t.ndim < 1) return false;
  const int last = t.ndim - 1;
  rows->data = t.data;
  rows->dtype = t.dtype;
  rows->columns = t.shape[last];
  if (rows->columns < 1) return false;
  // torch takes any strides for contiguous where there are no elements, and rearranges nothing.
  if (rows->columns > 1 && t.strides[last] != 1 && t.numel > 0) return false;
  return flatten(t, last, &rows->rows, &rows->stride);
}

// [..., columns] as rows in planes, if groups of at least as many rows as a vector has lanes lie
// side by side: fewer are sooner copied. ksam_kernels/loss/layout.py asks the same, group_of().
inline bool as_planes(const Tensor& t, Matrix* rows) {
  constexpr int64_t kWorthIt = 16;
  constexpr int64_t kCounted = int64_t{1} << 24;  // columns whose numbers float32 has
  if (!has_kernels(t) || t.ndim < 2) return false;
  const int last = t.ndim - 1;
  int outer = last;  // dimensions in front of those of a group
  int64_t group = 1;
  for (; outer > 0; --outer) {
    const int i = outer - 1;
    if (t.shape[i] != 1 && t.strides[i] != group) break;
    group *= t.shape[i];
  }
  rows->data = t.data;
  rows->dtype = t.dtype;
  rows->columns = t.shape[last];
  rows->group = group;
  rows->plane_stride = t.strides[last];
  if (group < kWorthIt || rows->columns < 2 || rows->columns >= kCounted) return false;
  if (t.strides[last] == 1) return false;  // rows that overlap
  int64_t groups;
  if (!flatten(t, outer, &groups, &rows->group_stride)) return false;
  rows->rows = groups * group;
  return true;
}

inline bool as_matrix(const Tensor& t, Matrix* rows) {
  if (as_rows(t, rows)) return true;
  *rows = {};
  return as_planes(t, rows);
}

// [...] as rows of one element, any stride between them.
inline bool as_column(const Tensor& t, Matrix* rows) {
  rows->data = t.data;
  rows->dtype = t.dtype;
  rows->columns = 1;
  return flatten(t, t.ndim, &rows->rows, &rows->stride);
}

}  // namespace ksam
