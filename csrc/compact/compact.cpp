// Compiled once: the work is memcpy's, which picks its instructions itself.
#include "compact/compact.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"

namespace ksam {
namespace {

// Bytes per thread below which starting another one takes longer than it saves.
constexpr int64_t kGrain = 128 * 1024;

// What a row costs besides its bytes, in bytes: reading its index, calling memcpy.
constexpr int64_t kRowCost = 32;

// Indices [k] as they lie in memory.
template <class Index>
struct Indices {
  const Index* data;
  int64_t stride;

  explicit Indices(const Tensor& t) : data(t.as<Index>()), stride(t.strides[0]) {}
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// body(indices) with the indices as they are typed.
template <class Body>
auto on_indices(const Tensor& t, const Body& body) {
  return t.dtype == DType::i32 ? body(Indices<int32_t>(t)) : body(Indices<int64_t>(t));
}

// Rows of 1, 2, 4, 8 or 16 bytes (labels, masks, ids): kBytes is known, so a copy is one move.
template <int kBytes, class Index>
void copy_small_rows(const Leaf& leaf, Indices<Index> indices, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    std::memcpy(leaf.out + i * kBytes, leaf.source + indices[i] * leaf.source_stride, kBytes);
  }
}

// Rows [begin, end) of the output.
template <class Index>
void copy_rows(const Leaf& leaf, Indices<Index> indices, int64_t begin, int64_t end) {
  const int64_t bytes = leaf.row_bytes;
  if (bytes == 1) return copy_small_rows<1>(leaf, indices, begin, end);
  if (bytes == 2) return copy_small_rows<2>(leaf, indices, begin, end);
  if (bytes == 4) return copy_small_rows<4>(leaf, indices, begin, end);
  if (bytes == 8) return copy_small_rows<8>(leaf, indices, begin, end);
  if (bytes == 16) return copy_small_rows<16>(leaf, indices, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    std::memcpy(leaf.out + i * bytes, leaf.source + indices[i] * leaf.source_stride, bytes);
  }
}

int64_t row_cost(const Leaf& leaf) { return leaf.row_bytes + kRowCost; }

}  // namespace

IndexRange index_range(const Tensor& t) {
  return on_indices(t, [&](auto indices) {
    IndexRange range{indices[0], indices[0]};
    for (int64_t i = 1; i < t.numel; ++i) {
      range.low = std::min(range.low, indices[i]);
      range.high = std::max(range.high, indices[i]);
    }
    return range;
  });
}

// Bytes moved: every chosen row read and written once, every index read once per leaf.
//
// All leaves share one parallel region. Their output rows, one leaf after the other, lie on a line
// on which each is as long as its cost; every thread takes one stretch of the line and copies the
// rows that begin there.
void gather_rows(const Leaf* leaves, int64_t leaf_count, const Tensor& t) {
  int64_t total = 0;
  for (int64_t l = 0; l < leaf_count; ++l) total += t.numel * row_cost(leaves[l]);
  parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    on_indices(t, [&](auto indices) {
      int64_t start = 0;  // of the leaf
      for (int64_t l = 0; l < leaf_count; ++l) {
        const int64_t cost = row_cost(leaves[l]);
        const auto first_row_from = [&](int64_t place) {
          return std::clamp((place - start + cost - 1) / cost, int64_t{0}, t.numel);
        };
        copy_rows(leaves[l], indices, first_row_from(begin), first_row_from(end));
        start += t.numel * cost;
      }
    });
  });
}

}  // namespace ksam
