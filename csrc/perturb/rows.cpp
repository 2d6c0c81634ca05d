#include "perturb/rows.h"

namespace ksam {

bool is_dense(const Tensor& t) {
  if (is_contiguous(t)) return true;
  // From the smallest stride up, each dimension must begin where those below it end. `filled`
  // grows, so no dimension is taken twice.
  int64_t filled = 1;
  while (filled < t.numel) {
    int d = 0;
    while (d < t.ndim && (t.shape[d] == 1 || t.strides[d] != filled)) ++d;
    if (d == t.ndim) return false;
    filled *= t.shape[d];
  }
  return true;
}

bool overlaps_itself(const Tensor& t) {
  for (int d = 0; d < t.ndim; ++d) {
    if (t.strides[d] == 0 && t.shape[d] > 1) return true;
  }
  return false;
}

Operand operand_of(const Tensor& t, bool flat) {
  Operand operand;
  operand.data = t.data;
  operand.shape = t.shape;
  operand.strides = flat ? nullptr : t.strides;
  operand.ndim = t.ndim;
  operand.itemsize = t.itemsize;
  operand.dtype = t.dtype;
  return operand;
}

}  // namespace ksam
