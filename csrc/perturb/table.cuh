// Tables of rows. A launch carries one by value in its parameters, so that nothing has to be copied
// to the device first. Rows are cut into chunks, and a block looks up the row of its chunk.
#pragma once

#include "common/block.cuh"
#include "perturb/layout.h"

namespace ksam::gpu {

constexpr int kThreads = gpu_or_simt(256, 64);        // of a block
constexpr int kBlockChunk = gpu_or_simt(4096, 2048);  // elements of a row that a block takes

constexpr int kTableBytes = kParameterBytes - 256;  // the rest is for a formula's arguments

inline int64_t chunks_of(int64_t numel) { return (numel + kBlockChunk - 1) / kBlockChunk; }

// For formulas that need nothing of a row but its operands.
struct NoValue {};

// Rows whose N operands all have the same dtype, and their elements in the same order in memory.
template <int N, class Value>
struct FlatTable {
  static constexpr int kRowBytes =
      N * sizeof(char*) + sizeof(int64_t) + sizeof(Value) + sizeof(int32_t);
  static constexpr int kRows = (kTableBytes - 16) / kRowBytes;

  char* data[N][kRows];
  int64_t numel[kRows];
  Value value[kRows];
  int32_t first_chunk[kRows];
  int32_t rows = 0;
  int32_t chunks = 0;

  __device__ int first_chunk_of(int r) const { return first_chunk[r]; }
  __device__ int64_t numel_of(int r) const { return numel[r]; }
  __device__ Value value_of(int r) const { return value[r]; }

  // False where the table is full.
  template <int M>
  bool add(const Row<M>& row, const Value& row_value) {
    if (rows == kRows) return false;
    for (int i = 0; i < N; ++i) data[i][rows] = row.operand[i].data;
    numel[rows] = row.numel;
    value[rows] = row_value;
    first_chunk[rows++] = chunks;
    chunks += static_cast<int32_t>(chunks_of(row.numel));
    return true;
  }
};

template <int N, class Value>
struct StridedRow {
  char* data[N];
  Layout<N> layout;
  int64_t numel;
  Value value;
  int32_t first_chunk;
  DType dtype[N];
  bool wide;  // arithmetic in double
};

// Rows of any dtypes and layouts.
template <int N, class Value>
struct StridedTable {
  static constexpr int kRows = (kTableBytes - 8) / sizeof(StridedRow<N, Value>);

  StridedRow<N, Value> row[kRows];
  int32_t rows = 0;
  int32_t chunks = 0;

  __device__ int first_chunk_of(int r) const { return row[r].first_chunk; }
  __device__ int64_t numel_of(int r) const { return row[r].numel; }
  __device__ Value value_of(int r) const { return row[r].value; }

  template <int M>
  bool add(const Row<M>& from, const Value& row_value) {
    if (rows == kRows) return false;
    StridedRow<N, Value>& to = row[rows++];
    to.layout.ndim = 0;
    if (!lay_out(from, &to.layout)) throw std::logic_error("RowTable declines so many dimensions");
    for (int i = 0; i < N; ++i) {
      to.data[i] = from.operand[i].data;
      to.dtype[i] = from.operand[i].dtype;
    }
    to.numel = from.numel;
    to.value = row_value;
    to.first_chunk = chunks;
    to.wide = from.wide;
    chunks += static_cast<int32_t>(chunks_of(from.numel));
    return true;
  }
};

// Elements [begin, begin + count) of a row.
struct Chunk {
  int row;
  int64_t begin;
  int count;
};

// The last row that begins at or before the chunk has it: an empty row begins where the next does.
template <class Table>
__device__ __forceinline__ Chunk chunk_of(const Table& table, int chunk) {
  int low = 0, high = table.rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk_of(middle) <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = int64_t{chunk - table.first_chunk_of(low)} * kBlockChunk;
  const int64_t left = table.numel_of(low) - begin;
  return {low, begin, static_cast<int>(left < kBlockChunk ? left : kBlockChunk)};
}

template <class Table>
__device__ __forceinline__ Chunk chunk_of_block(const Table& table) {
  return chunk_of(table, static_cast<int>(blockIdx.x));
}

// At least one, so that a table of empty rows is launched too: their steps are counted.
template <class Table>
unsigned blocks_of(const Table& table) {
  return static_cast<unsigned>(table.chunks > 0 ? table.chunks : 1);
}

// --- Launches of a call -------------------------------------------------------------------------

constexpr int kStrided = 4;  // a kind of its own, after the four floating dtypes

// The dtype of all N operands of a flat row, else kStrided.
template <int N, int M>
int kind_of(const Row<M>& row) {
  for (int i = 0; i < N; ++i) {
    if (row.operand[i].strides != nullptr) return kStrided;
    if (row.operand[i].dtype != row.operand[0].dtype) return kStrided;
  }
  return static_cast<int>(row.operand[0].dtype);
}

// body(table) for every table that it takes to hold all rows of a kind, with value_of(row) as the
// value of each.
template <class Table, int N, int M, class ValueOf, class Body>
void for_each_table(const Rows<M>& rows, int kind, const ValueOf& value_of, const Body& body) {
  static_assert(sizeof(Table) <= kTableBytes && Table::kRows > 0, "too many parameters");
  Table table;
  for (int64_t r = 0; r < rows.count; ++r) {
    const Row<M>& row = rows.row[r];
    if (kind_of<N>(row) != kind || table.add(row, value_of(row))) continue;
    body(table);
    table.rows = table.chunks = 0;
    table.add(row, value_of(row));
  }
  body(table);
}

// Calls flat(dtype, table) and strided(table) with tables of all rows. The formula takes the first
// N operands of a row.
template <int N, class Value, int M, class ValueOf, class Flat, class Strided>
void for_each_launch(const Rows<M>& rows, const ValueOf& value_of, const Flat& flat,
                     const Strided& strided) {
  unsigned kinds = 0;
  for (int64_t r = 0; r < rows.count; ++r) kinds |= 1u << kind_of<N>(rows.row[r]);
  for (int kind = 0; kind < kStrided; ++kind) {
    if ((kinds >> kind & 1) == 0) continue;
    for_each_table<FlatTable<N, Value>, N>(
        rows, kind, value_of, [&](const auto& table) { flat(static_cast<DType>(kind), table); });
  }
  if ((kinds >> kStrided & 1) != 0) {
    for_each_table<StridedTable<N, Value>, N>(rows, kStrided, value_of, strided);
  }
}

}  // namespace ksam::gpu
