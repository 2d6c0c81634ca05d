// Describes tensors as the matrices that the kernels of losses take. Each function returns false
// for a tensor that does not have the layout it asks for.
#pragma once

#include "common/gpu.h"
#include "loss/loss.h"

namespace ksam {

// The first `ndim` dimensions as one dimension; false where no single stride steps through them.
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
inline bool as_rows(const Tensor& t, Matrix* m) {
  if (!has_kernels(t) || t.ndim < 1) return false;
  const int last = t.ndim - 1;
  m->data = t.data;
  m->dtype = t.dtype;
  m->columns = t.shape[last];
  if (m->columns < 1) return false;
  // torch calls any strides contiguous where there are no elements, and rearranges nothing.
  if (m->columns > 1 && t.strides[last] != 1 && t.numel > 0) return false;
  return flatten(t, last, &m->rows, &m->stride);
}

// [..., columns] as rows in planes, if groups of at least as many rows as a vector has lanes lie
// side by side; smaller groups are copied in less time. group_of() of ksam_kernels/loss/layout.py
// applies the same rule.
inline bool as_planes(const Tensor& t, Matrix* m) {
  constexpr int64_t kWorthIt = 16;
  constexpr int64_t kCounted = int64_t{1} << 24;  // float32 holds the indices of this many columns
  if (!has_kernels(t) || t.ndim < 2) return false;
  const int last = t.ndim - 1;
  int outer = last;  // how many dimensions come before those of a group
  int64_t group = 1;
  for (; outer > 0; --outer) {
    const int i = outer - 1;
    if (t.shape[i] != 1 && t.strides[i] != group) break;
    group *= t.shape[i];
  }
  m->data = t.data;
  m->dtype = t.dtype;
  m->columns = t.shape[last];
  m->group = group;
  m->plane_stride = t.strides[last];
  if (group < kWorthIt || m->columns < 2 || m->columns >= kCounted) return false;
  if (t.strides[last] == 1) return false;  // rows that overlap
  int64_t groups;
  if (!flatten(t, outer, &groups, &m->group_stride)) return false;
  m->rows = groups * group;
  return true;
}

inline bool as_matrix(const Tensor& t, Matrix* m) {
  if (as_rows(t, m)) return true;
  *m = {};
  return as_planes(t, m);
}

// [...] as rows of one element, with any stride between them.
inline bool as_column(const Tensor& t, Matrix* m) {
  m->data = t.data;
  m->dtype = t.dtype;
  m->columns = 1;
  return flatten(t, t.ndim, &m->rows, &m->stride);
}

}  // namespace ksam
