// How the kernels of the loss room walk over rows, a register's worth of lanes at a time.
//
// Wide rows, of at least sixteen elements, go block by block: a block fits the first-level cache,
// so that a second look at it reads no memory. The last vector of a block overlaps the one before.
// Narrow rows of logits go sixteen at a time, transposed into a tile: a lane is a row then, and
// nothing is added up across lanes. (elementwise_cpu.cpp has those of elementwise losses.) Rows in
// planes are sixteen at a time by nature. Whichever way, a row's result does not depend on its
// neighbours.
#pragma once

#include "common/dispatch.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "loss/loss.h"

namespace ksam::KSAM_ISA {

constexpr int64_t kBlock = 2048;
constexpr int64_t kBlockRoom = kBlock + kLanes;  // a block takes a remainder below kLanes along
constexpr int64_t kPlanes = 128;                 // at once: 8 KB of float32
constexpr int64_t kAhead = 4 * kLanes;  // elements of a plane to ask for before their turn comes

// Rows for which a thread more is worth waking: that takes as long as some 32,000 elements. No rows
// may have no columns.
KSAM_INLINE int64_t row_grain(int64_t columns) {
  constexpr int64_t kElements = 32768;
  return columns < kElements ? kElements / (columns > 0 ? columns : 1) : 1;
}

template <class T>
KSAM_INLINE T* row_of(const Matrix& m, int64_t row) {
  return reinterpret_cast<T*>(m.data) + row * m.stride;
}

// Column 0 of a row in planes, and of the rows behind it.
template <class T>
KSAM_INLINE T* plane_of(const Matrix& m, int64_t row) {
  return reinterpret_cast<T*>(m.data) + row / m.group * m.group_stride + row % m.group;
}

// Rows that are taken at once: sixteen from `first` on, of which those that count are `count` from
// `first + lane` on. In planes the others are there too, and are read: a vector does not leave a
// group, and those at its end overlap.
struct Sixteen {
  int64_t first, lane, count;
};

KSAM_INLINE Sixteen sixteen_rows(const Matrix& m, int64_t row, int64_t end) {
  int64_t count = end - row < kLanes ? end - row : kLanes;
  if (!m.in_planes()) return {row, 0, count};
  const int64_t left = m.group - row % m.group;  // of the group
  if (left < count) count = left;
  const int64_t lane = left < kLanes ? kLanes - left : 0;
  return {row - lane, lane, count};
}

// body(begin, count) over the blocks of [0, n), n >= kLanes; every count is at least kLanes.
template <class Body>
KSAM_INLINE void for_each_block(int64_t n, const Body& body) {
  for (int64_t begin = 0; begin < n;) {
    const int64_t count = n - begin < kBlockRoom ? n - begin : kBlock;
    body(begin, count);
    begin += count;
  }
}

// body(i, kept) for elements i .. i + 15 of [0, n), n >= kLanes, where kept(v) is v in the lanes of
// elements that no earlier call had, and 0 in the others.
template <class V, class Body>
KSAM_INLINE void for_each_sum(int64_t n, const Body& body) {
  using A = typename LaneTraits<V>::element;
  static constexpr A kKeep[2 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                          1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    body(i, [](const V& v) KSAM_INLINE_LAMBDA { return v; });
  }
  if (i < n) {
    const V keep = load_lanes<V>(kKeep + (n - i));
    body(n - kLanes, [&](const V& v) KSAM_INLINE_LAMBDA { return masked(v, keep); });
  }
}

// n elements in the arithmetic's type A: in place where they have it already, else in `room`.
template <class A>
const A* staged(const Matrix& m, int64_t row, int64_t begin, int64_t n, A* room) {
  const A* place = nullptr;
  on_floating(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = row_of<T>(m, row) + begin;
    if constexpr (sizeof(T) == sizeof(A)) {  // the same type
      place = reinterpret_cast<const A*>(from);
    } else {
      place = room;
      convert(from, n, room);
    }
  });
  return place;
}

// Sixteen narrow rows, of `columns` <= kColumns elements, transposed: element [c][lane]. Lanes that
// get no row hold zeros, as far as the rows reach: most are much shorter than they may be.
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
