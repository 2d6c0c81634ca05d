#include "perturb/rows.h"

namespace ksam {

bool is_dense(const Tensor& t) {
  if (is_contiguous(t)) return true;
  // Dimensions in ascending order of stride must fill what lies below them.
  int64_t expected = 1;
  bool used[64] = {};
  for (int placed = 0; placed < t.ndim; ++placed) {
    int next = -1;
    for (int d = 0; d < t.ndim && next < 0; ++d) {
      if (!used[d] && (t.strides[d] == expected || t.shape[d] == 1)) next = d;
    }
    if (next < 0) return false;
    used[next] = true;
    expected *= t.shape[next];
  }
  return true;
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
