// Walks over rows for the kernels of losses, a vector of sixteen lanes at a time.
//
// Wide rows, of at least sixteen elements, go block by block: a block fits the first-level cache,
// so that a second look at it reads no memory. The last vector of a block overlaps the one before.
// Narrow rows of logits go sixteen at a time, transposed into a tile: a lane is a row then, and
// nothing is added up across lanes. (elementwise_cpu.cpp has the narrow rows of elementwise
// losses.) Rows in planes need no transposing to go sixteen at a time. In every case, a row's
// result does not depend on its neighbours.
#pragma once

#include "common/dispatch.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "loss/loss.h"

namespace ksam::KSAM_ISA {

constexpr int64_t kBlock = 2048;  // elements
// The last block of a row takes along what is left, if that is less than a vector.
constexpr int64_t kBlockCapacity = kBlock + kLanes;
constexpr int64_t kPlanes = 128;        // that are staged at once: 8 KB of float32
constexpr int64_t kAhead = 4 * kLanes;  // how many elements ahead a plane is prefetched

// How many rows make it worth waking one more thread, which takes as long as some 32,000 elements.
// There may be 0 columns, where there are no rows.
KSAM_INLINE int64_t row_grain(int64_t columns) {
  constexpr int64_t kElements = 32768;
  return columns < kElements ? kElements / (columns > 0 ? columns : 1) : 1;
}

template <class T>
KSAM_INLINE T* row_of(const Matrix& m, int64_t row) {
  return reinterpret_cast<T*>(m.data) + row * m.stride;
}

// Column 0 of a row in planes. That of the group's next row comes right after it.
template <class T>
KSAM_INLINE T* plane_of(const Matrix& m, int64_t row) {
  return reinterpret_cast<T*>(m.data) + row / m.group * m.group_stride + row % m.group;
}

// Sixteen rows from `first` on, which are taken at once. Those that count are the `count` rows from
// lane `lane` on. In planes the others exist too, and are read: a vector must not leave its group,
// so that the last two vectors of a group may overlap.
struct Sixteen {
  int64_t first, lane, count;
};

KSAM_INLINE Sixteen sixteen_rows(const Matrix& m, int64_t row, int64_t end) {
  int64_t count = end - row < kLanes ? end - row : kLanes;
  if (!m.in_planes()) return {row, 0, count};
  const int64_t left = m.group - row % m.group;  // rows of the group from this one on
  if (left < count) count = left;
  const int64_t lane = left < kLanes ? kLanes - left : 0;
  return {row - lane, lane, count};
}

// body(begin, count) over the blocks of [0, n), n >= kLanes; every count is at least kLanes.
template <class Body>
KSAM_INLINE void for_each_block(int64_t n, const Body& body) {
  for (int64_t begin = 0; begin < n;) {
    const int64_t count = n - begin < kBlockCapacity ? n - begin : kBlock;
    body(begin, count);
    begin += count;
  }
}

// body(i, fresh) for elements i .. i + 15 of [0, n), n >= kLanes, where fresh(v) is v in the lanes
// of elements that no earlier call had, and 0 in the others.
template <class V, class Body>
KSAM_INLINE void for_each_sum(int64_t n, const Body& body) {
  using A = typename LaneTraits<V>::element;
  static constexpr A kMask[2 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                          1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    body(i, [](const V& v) KSAM_INLINE_LAMBDA { return v; });
  }
  if (i < n) {
    const V mask = load_lanes<V>(kMask + (n - i));
    body(n - kLanes, [&](const V& v) KSAM_INLINE_LAMBDA { return masked(v, mask); });
  }
}

// n elements in the arithmetic's type A: in place where they have it already, else in `buffer`.
template <class A>
const A* staged(const Matrix& m, int64_t row, int64_t begin, int64_t n, A* buffer) {
  const A* place = nullptr;
  on_floating(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = row_of<T>(m, row) + begin;
    if constexpr (sizeof(T) == sizeof(A)) {  // the same type
      place = reinterpret_cast<const A*>(from);
    } else {
      place = buffer;
      convert(from, n, buffer);
    }
  });
  return place;
}

// Sixteen narrow rows, of `columns` <= kColumns elements, transposed: element [c][lane]. Lanes that
// get no row hold zeros, but only in those columns: most rows are much shorter than kColumns.
template <class T, int64_t kColumns>
struct Tile {
  explicit Tile(int64_t columns) { std::memset(at, 0, columns * sizeof(at[0])); }
  T at[kColumns][kLanes];
};

template <class T, int64_t kColumns>
KSAM_INLINE void put_row(const T* row, int64_t n, int64_t lane, Tile<T, kColumns>* tile) {
  for (int64_t c = 0; c < n; ++c) tile->at[c][lane] = row[c];
}

template <class T, int64_t kColumns>
KSAM_INLINE void take_row(const Tile<T, kColumns>& tile, int64_t n, int64_t lane, T* row) {
  for (int64_t c = 0; c < n; ++c) row[c] = tile.at[c][lane];
}

}  // namespace ksam::KSAM_ISA
