// Walks over the rows of a call and applies a formula to them.
//
// Where all operands of a row lie in memory order and have one dtype, the formula is applied to
// them a register at a time, converted on the way in and out. Everything else (a gradient with
// strides of its own, a dtype of its own) is first converted into small buffers, block by block,
// and back afterwards. Nothing is contracted, so the results are the same bits either way.
#pragma once

#include "common/dispatch.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "perturb/perturb.h"

namespace ksam::KSAM_ISA {

constexpr int kBlock = 512;  // elements of a buffer: five operands of doubles fit 32 KiB
// Bytes that are streamed at a time: few enough for the processor to read the next ones while its
// write buffers empty.
constexpr int kTileBytes = 512;
// Below this number of elements a second thread costs more than it saves.
constexpr int64_t kSerial = 32768;

// visit(address, j) for the j-th of the logical elements [begin, begin + n) of a strided operand.
template <class Visit>
void for_each_strided(const Operand& t, int64_t begin, int n, const Visit& visit) {
  // The innermost dimension first; those of size 1 are left out, so that no more remain than an
  // element count has bits.
  int64_t index[63], size[63], step[63];
  int dims = 0;
  char* element = t.data;
  int64_t rest = begin;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    index[dims] = rest % t.shape[d];
    size[dims] = t.shape[d];
    step[dims] = t.strides[d] * t.itemsize;
    rest /= t.shape[d];
    element += index[dims] * step[dims];
    ++dims;
  }
  for (int j = 0; j < n; ++j) {
    visit(element, j);
    for (int d = 0; d < dims; ++d) {
      element += step[d];
      if (++index[d] < size[d]) break;
      element -= size[d] * step[d];
      index[d] = 0;
    }
  }
}

// Fetches the next block while this one's buffers are worked on. The processor would not do so by
// itself, as it sees no loads of the operand in the meantime.
inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(data) + at);
  }
}

// Elements [begin, begin + n) as A: where they lie if they are A in memory order, else in `buffer`.
template <class A>
A* stage(const Operand& t, Access access, int64_t begin, int n, A* buffer) {
  A* where = buffer;
  on_floating(t.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* data = reinterpret_cast<T*>(t.data);
    if (t.strides == nullptr) {
      if constexpr (sizeof(T) == sizeof(A)) {
        where = reinterpret_cast<A*>(data) + begin;
      } else if (access & kRead) {
        convert(data + begin, n, buffer);
        prefetch(data + begin + n, n * sizeof(T));
      }
    } else if (access & kRead) {
      for_each_strided(t, begin, n, [&](char* element, int j) {
        buffer[j] = static_cast<A>(load_one(reinterpret_cast<T*>(element)));
      });
    }
  });
  return where;
}

// Copies bytes; if `streaming`, bypasses the caches, which would first read the lines written to.
inline void copy_flat(const char* from, int64_t bytes, bool streaming, char* to) {
  int64_t at = 0;
  if (streaming && is_line_aligned(to)) {
    for (; at + 64 <= bytes; at += 64) stream_line(from + at, to + at);
  }
  if (at < bytes) std::memcpy(to + at, from + at, bytes - at);
}

// Writes what was computed in a buffer to the operand, rounded to its dtype.
template <class A>
void unstage(const Operand& t, int64_t begin, int n, const A* buffer) {
  on_floating(t.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (t.strides == nullptr) {
      convert(buffer, n, reinterpret_cast<T*>(t.data) + begin);
    } else {
      for_each_strided(t, begin, n, [&](char* element, int j) {
        store_one(reinterpret_cast<T*>(element), static_cast<Opmath<T>>(buffer[j]));
      });
    }
  });
}

// body(row, chunk, begin, end) over the chunks of all rows, in one parallel region.
template <int N, class Body>
void for_each_chunk(const Rows<N>& rows, const Body& body) {
  const int64_t chunks = rows.first_chunk[rows.count];
  const int64_t grain = rows.numel < kSerial ? chunks : kSerial / kChunk;
  parallel_for(chunks, grain, [&](int64_t first, int64_t last) {
    int64_t low = 0, high = rows.count - 1;  // the row of the first chunk
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (rows.first_chunk[middle] <= first) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    for (int64_t chunk = first; chunk < last; ++chunk) {
      while (rows.first_chunk[low + 1] <= chunk) ++low;
      const Row<N>& row = rows.row[low];
      const int64_t begin = (chunk - rows.first_chunk[low]) * kChunk;
      const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
      body(row, chunk, begin, end);
    }
    if (rows.streaming) stream_fence();
  });
}

// body(operands, n) over the blocks of [begin, end), with A* operands[N]: null for operands that
// the row does not have or that are not touched.
template <class A, int N, class Body>
void for_each_block(const Row<N>& row, const Access (&access)[N], int64_t begin, int64_t end,
                    const Body& body) {
  alignas(64) A buffer[N][kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    A* operand[N];
    for (int i = 0; i < N; ++i) {
      const bool absent = row.operand[i].data == nullptr || access[i] == kUntouched;
      operand[i] = absent ? nullptr : stage(row.operand[i], access[i], at, n, buffer[i]);
    }
    body(operand, n);
    for (int i = 0; i < N; ++i) {
      if ((access[i] & kWrite) && operand[i] == buffer[i]) {
        unstage(row.operand[i], at, n, buffer[i]);
      }
    }
  }
}

// Calls formula(x), x[i] being a register of elements of operand i. Does so for two registers at a
// time, as one instruction packs two registers to bfloat16.
template <class T, int N, class Formula>
KSAM_INLINE void apply(const Formula& formula, T* const (&operand)[N], int64_t j) {
  using V = Register<T>;
  V low[N], high[N];
  for (int i = 0; i < N; ++i) {
    if (Formula::kAccess[i] & kRead) {
      const auto both = load_lanes<Pair<V>>(operand[i] + j);
      low[i] = both.low;
      high[i] = both.high;
    }
  }
  formula(low);
  formula(high);
  for (int i = 0; i < N; ++i) {
    if (Formula::kAccess[i] & kWrite) store_lanes(operand[i] + j, Pair<V>{low[i], high[i]});
  }
}

// Takes the formula by value, so that the compiler knows that no store changes its numbers.
template <class T, int N, class Formula>
KSAM_INLINE void apply_to_all(Formula formula, T* const (&operand)[N], int64_t n) {
  constexpr int kCount = 2 * LaneTraits<Register<T>>::kCount;
  int64_t j = 0;
  for (; j + kCount <= n; j += kCount) apply(formula, operand, j);
  if (j == n) return;
  T padded[N][kCount] = {};
  T* part[N];
  for (int i = 0; i < N; ++i) {
    part[i] = padded[i];
    if (Formula::kAccess[i] & kRead) std::memcpy(part[i], operand[i] + j, (n - j) * sizeof(T));
  }
  apply(formula, part, 0);
  for (int i = 0; i < N; ++i) {
    if (Formula::kAccess[i] & kWrite) std::memcpy(operand[i] + j, part[i], (n - j) * sizeof(T));
  }
}

// The same tile by tile; what is written to operand 0 bypasses the caches.
template <class T, int N, class Formula>
KSAM_INLINE void apply_streaming(const Formula& formula, T* const (&operand)[N], int64_t n) {
  constexpr int kTile = kTileBytes / sizeof(T);
  alignas(64) T tile[kTile];
  for (int64_t at = 0; at < n; at += kTile) {
    const int count = static_cast<int>(n - at < kTile ? n - at : kTile);
    T* part[N] = {tile};
    for (int i = 1; i < N; ++i) part[i] = operand[i] == nullptr ? nullptr : operand[i] + at;
    apply_to_all(formula, part, count);
    copy_flat(reinterpret_cast<const char*>(tile), count * sizeof(T), true,
              reinterpret_cast<char*>(operand[0] + at));
  }
}

// Whether the operands that the formula touches all lie in memory order and have one dtype, whose
// arithmetic is what the row asks for.
template <class Formula, int N>
bool is_uniform(const Row<N>& row) {
  const DType dtype = row.operand[0].dtype;
  for (int i = 0; i < N; ++i) {
    const Operand& t = row.operand[i];
    if (Formula::kAccess[i] == kUntouched) continue;
    if (t.strides != nullptr || t.dtype != dtype) return false;
  }
  return row.wide == (dtype == DType::f64);
}

// Applies a formula on A to the elements [begin, end) of a row. If `streaming`, writes of operand 0
// bypass the caches where that pays: if it is only written, and is not the memory of operand 1.
template <class A, int N, class Formula>
void transform(const Row<N>& row, bool streaming, int64_t begin, int64_t end,
               const Formula& formula) {
  if (!is_uniform<Formula>(row)) {
    for_each_block<A>(row, Formula::kAccess, begin, end,
                      [&](A* const(&operand)[N], int n) { apply_to_all(formula, operand, n); });
    return;
  }
  const bool past_caches =
      streaming && Formula::kAccess[0] == kWrite && row.operand[0].data != row.operand[1].data;
  on_floating(row.operand[0].dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(A) == sizeof(Opmath<T>)) {
      T* operand[N];
      for (int i = 0; i < N; ++i) {
        const bool touched = Formula::kAccess[i] != kUntouched;
        operand[i] = touched ? reinterpret_cast<T*>(row.operand[i].data) + begin : nullptr;
      }
      if (past_caches) {
        apply_streaming(formula, operand, end - begin);
      } else {
        apply_to_all(formula, operand, end - begin);
      }
    }
  });
}

// body(Type<A>{}), A being the type of the row's arithmetic.
template <int N, class Body>
KSAM_INLINE void on_arithmetic(const Row<N>& row, const Body& body) {
  return row.wide ? body(Type<double>{}) : body(Type<float>{});
}

}  // namespace ksam::KSAM_ISA
