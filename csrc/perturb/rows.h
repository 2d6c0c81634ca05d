// From lists of tensors to the rows of a kernel call.
#pragma once

#include <array>
#include <vector>

#include "common/gpu.h"
#include "common/tensor.h"
#include "perturb/layout.h"
#include "perturb/perturb.h"

namespace ksam {

using TensorList = std::vector<Tensor>;

// With at least this many bytes of operands, a call bypasses the caches for what it only writes.
constexpr int64_t kStreamFrom = int64_t{8} << 20;

// Whether the elements fill a piece of memory, each once: they can then be walked in memory order.
bool is_dense(const Tensor& t);

// Whether a stride of 0 makes elements share memory. torch does not look for other overlaps either.
bool overlaps_itself(const Tensor& t);

Operand operand_of(const Tensor& t, bool flat);

// Rows of N lists of equal length; list 0 says what every tensor's shape is.
template <int N>
class RowTable {
 public:
  // An empty list stands for an operand that no row has; bit i of `written`: list i is written.
  // False where a tensor is not floating, does not fit its row, is on a device without kernels or
  // not on the first tensor's device, or is written and overlaps itself.
  bool build(const std::array<const TensorList*, N>& lists, unsigned written) {
    const size_t count = lists[0]->size();
    if (count != 0 && !has_kernels(lists[0]->front())) return false;
    for (const TensorList* list : lists) {
      if (!list->empty() && list->size() != count) return false;
    }
    rows_.reserve(count);
    first_chunk_.reserve(count + 1);
    first_chunk_.push_back(0);
    for (size_t r = 0; r < count; ++r) {
      if (!add(lists, written, r)) return false;
    }
    return true;
  }

  Rows<N> rows() const {
    return {rows_.data(), first_chunk_.data(), static_cast<int64_t>(rows_.size()), numel_,
            bytes_ >= kStreamFrom};
  }
  int64_t chunks() const { return first_chunk_.back(); }
  void widen() {
    for (Row<N>& row : rows_) row.wide = true;
  }

 private:
  // Whether a GPU kernel can hold the row's dimensions.
  static bool can_walk(const Row<N>& row) {
    Layout<N> layout;
    return lay_out(row, &layout);
  }

  // Adds row r; an empty one too, as its parameter may have a step count.
  bool add(const std::array<const TensorList*, N>& lists, unsigned written, size_t r) {
    const Tensor &like = (*lists[0])[r], &first = (*lists[0])[0];
    bool flat = is_dense(like);
    for (const TensorList* list : lists) {
      if (list->empty()) continue;
      const Tensor& t = (*list)[r];
      if (!same_device(t, first) || !is_floating(t.dtype) || !same_shape(t, like)) return false;
      flat = flat && same_layout(t, like);
    }
    Row<N> row;
    for (int i = 0; i < N; ++i) {
      if (lists[i]->empty()) continue;
      const bool is_written = (written >> i & 1) != 0;
      if (!flat && is_written && overlaps_itself((*lists[i])[r])) return false;
      row.operand[i] = operand_of((*lists[i])[r], flat);
      bytes_ += like.numel * row.operand[i].itemsize;
    }
    row.numel = like.numel;
    row.index = static_cast<int64_t>(r);
    row.wide = like.dtype == DType::f64;
    if (!flat && on_gpu(like) && !can_walk(row)) return false;
    rows_.push_back(row);
    numel_ += like.numel;
    first_chunk_.push_back(first_chunk_.back() + (like.numel + kChunk - 1) / kChunk);
    return true;
  }

  std::vector<Row<N>> rows_;
  std::vector<int64_t> first_chunk_;
  int64_t numel_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace ksam
