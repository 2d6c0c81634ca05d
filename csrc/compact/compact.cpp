// Compiled once, not per instruction set: memcpy chooses its own, and the rest is loads and stores.
#include "compact/compact.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"

namespace ksam {
namespace {

// Bytes per thread below which starting another thread takes longer than it saves.
constexpr int64_t kGrain = 128 * 1024;

// What a row costs besides its bytes, in bytes: reading its index, calling memcpy.
constexpr int64_t kRowCost = 32;

// How many rows ahead the first cache line of a row is fetched; the processor fetches its other
// lines unasked.
constexpr int64_t kAhead = 8;

int64_t row_cost(const Leaf& leaf) { return leaf.row_bytes + kRowCost; }

// Indices [k] as they lie in memory.
template <class Index>
struct Indices {
  const Index* data;
  int64_t stride;

  explicit Indices(const Tensor& t) : data(t.as<Index>()), stride(t.strides[0]) {}
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// body(indices), with the indices in their own type.
template <class Body>
auto on_indices(const Tensor& t, const Body& body) {
  return t.dtype == DType::i32 ? body(Indices<int32_t>(t)) : body(Indices<int64_t>(t));
}

// Rows of kWord to 2 * kWord bytes (labels, masks, ids): copies the first kWord bytes and the last,
// which may overlap. A call of memcpy would take twice as long.
template <int kWord, class Index>
void copy_small_rows(const Leaf& leaf, Indices<Index> indices, int64_t begin, int64_t end) {
  // In locals: the compiler must assume that the stores through `out` change the leaf.
  const auto [source, stride, out, bytes] = leaf;
  const int64_t last = bytes - kWord;
  for (int64_t i = begin; i < end; ++i) {
    const char* row = source + indices[i] * stride;
    std::memcpy(out + i * bytes, row, kWord);
    if (last > 0) std::memcpy(out + i * bytes + last, row + last, kWord);
  }
}

template <class Index>
void copy_large_rows(const Leaf& leaf, Indices<Index> indices, int64_t begin, int64_t end) {
  const auto [source, stride, out, bytes] = leaf;
  for (int64_t i = begin; i < end; ++i) {
    __builtin_prefetch(source + indices[std::min(i + kAhead, end - 1)] * stride);
    std::memcpy(out + i * bytes, source + indices[i] * stride, bytes);
  }
}

// Rows [begin, end) of the output.
template <class Index>
void copy_rows(const Leaf& leaf, Indices<Index> indices, int64_t begin, int64_t end) {
  if (leaf.row_bytes < 2) return copy_small_rows<1>(leaf, indices, begin, end);
  if (leaf.row_bytes < 4) return copy_small_rows<2>(leaf, indices, begin, end);
  if (leaf.row_bytes < 8) return copy_small_rows<4>(leaf, indices, begin, end);
  if (leaf.row_bytes < 16) return copy_small_rows<8>(leaf, indices, begin, end);
  if (leaf.row_bytes < 32) return copy_small_rows<16>(leaf, indices, begin, end);
  if (leaf.row_bytes < 64) return copy_small_rows<32>(leaf, indices, begin, end);
  copy_large_rows(leaf, indices, begin, end);
}

}  // namespace

// Bytes moved: 8k read (4k for int32).
bool in_range(const Tensor& t, int64_t rows) {
  return on_indices(t, [&](auto indices) {
    uint64_t bad = 0;  // its highest bit is set if some index, or rows - 1 - index, was negative
    for (int64_t i = 0; i < t.numel; ++i) {
      const uint64_t index = indices[i];
      bad |= index | (rows - 1 - index);
    }
    return bad >> 63 == 0;
  });
}

// Bytes moved: every chosen row read and written once, every index read once per leaf.
//
// All leaves share one parallel region. Think of their output rows as laid end to end, leaf after
// leaf, each as long as its cost; every thread takes one range of that line and copies the rows
// that begin in it.
void gather_rows(const Leaf* leaves, int64_t leaf_count, const Tensor& t) {
  const int64_t k = t.numel;
  int64_t total = 0;
  for (int64_t l = 0; l < leaf_count; ++l) total += k * row_cost(leaves[l]);
  parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    on_indices(t, [&](auto indices) {
      int64_t leaf_begin = 0;
      for (int64_t l = 0; l < leaf_count; ++l) {
        const int64_t cost = row_cost(leaves[l]);
        const auto first_row_from = [&](int64_t place) {
          return std::clamp((place - leaf_begin + cost - 1) / cost, int64_t{0}, k);
        };
        copy_rows(leaves[l], indices, first_row_from(begin), first_row_from(end));
        leaf_begin += k * cost;
      }
    });
  });
}

}  // namespace ksam
