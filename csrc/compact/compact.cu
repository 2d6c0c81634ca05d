// Copies the chosen rows of every leaf, in the widest vectors that its rows allow.
//
// Bytes moved: every chosen row is read and written once; an index is read for every vector of a
// row, all but the row's first from the cache. Launches: 1 for every kMaxLeaves leaves.
#include "common/block.cuh"
#include "compact/compact.h"

namespace ksam::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // of a thread, all in flight at once
constexpr int kTileVectors = kThreads * kLoads;
// As many blocks as a multiprocessor has registers for. (The runner drops __launch_bounds__.)
[[maybe_unused]] constexpr int kBlocks = 5;

// A leaf as it lies in the kernel's parameters.
struct PackedLeaf {
  const char* source;  // [B] rows
  char* out;           // [k] rows without gaps
  int64_t row_bytes;
  int64_t source_stride;  // bytes from one row to the next
  int32_t log2_vector;    // of the widest vectors, 1 to 16 bytes, that all of the above allow
  uint32_t first_tile;    // in the launch; the leaf's tiles end where the next leaf's begin
};

// 4 KB hold 101 leaves, more than batches have. The table is no larger, as every launch copies it.
constexpr int kBatchBytes = kParameterBytes < 4096 ? kParameterBytes : 4096;
constexpr int kOtherBytes = 40;  // the count and the other parameters
constexpr int kMaxLeaves = (kBatchBytes - kOtherBytes) / static_cast<int>(sizeof(PackedLeaf));

struct Leaves {
  PackedLeaf at[kMaxLeaves];
  int count;
};

template <class Index>
struct IndexList {
  const Index* data;  // [k]
  int64_t stride;
  int64_t rows;  // B, which no index reaches

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return __ldg(data + i * stride);
  }
  __device__ __forceinline__ bool takes(int64_t index) const { return index >= 0 && index < rows; }
};

static_assert(sizeof(Leaves) + sizeof(IndexList<int64_t>) + sizeof(int64_t) <= kBatchBytes);

// The leaf in whose output the tile lies.
__device__ __forceinline__ int leaf_of(const Leaves& leaves, uint32_t tile) {
  int low = 0, high = leaves.count;  // the leaf is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (leaves.at[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

// A vector's place in the output.
struct Place {
  int64_t row;
  int64_t column;  // in vectors
};

// The place `by` < kTileVectors vectors further on. Avoids dividing 64-bit numbers, which is slow:
// a row is either longer than a tile, or its length fits 32 bits.
__device__ __forceinline__ Place advanced(Place at, int by, int64_t row_vectors) {
  at.column += by;
  uint32_t past = at.column >= row_vectors;
  if (row_vectors <= kTileVectors) {
    past = static_cast<uint32_t>(at.column) / static_cast<uint32_t>(row_vectors);
  }
  return {at.row + past, at.column - past * row_vectors};
}

// Copies the block's tile of a leaf: kTileVectors vectors of the output, or those that are left.
// First come all loads of indices, then all loads of vectors, then all stores. Threads past the end
// load the last vector again, so that no load has a condition.
template <class V, class Index>
__device__ __forceinline__ void copy_tile(const PackedLeaf& leaf, const IndexList<Index>& indices,
                                          int64_t k, int64_t tile) {
  const int64_t row_vectors = leaf.row_bytes / static_cast<int64_t>(sizeof(V));
  const int64_t begin = tile * kTileVectors, left = k * row_vectors - begin;
  const int count = left < kTileVectors ? static_cast<int>(left) : kTileVectors;
  const Place first{begin / row_vectors, begin % row_vectors};
  const int thread = static_cast<int>(threadIdx.x);
  int64_t index[kLoads], column[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Place place = advanced(first, min(thread + i * kThreads, count - 1), row_vectors);
    index[i] = indices[place.row];
    column[i] = place.column;
  }
  bool all_indices_in_range = true;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) all_indices_in_range &= indices.takes(index[i]);
  KSAM_DEVICE_ASSERT(all_indices_in_range);
  V vector[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const char* row = leaf.source + index[i] * leaf.source_stride;
    KSAM_CHECK_ALIGNED(row, sizeof(V));
    vector[i] = reinterpret_cast<const V*>(row)[column[i]];
  }
  V* out = reinterpret_cast<V*>(leaf.out) + begin + thread;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (thread + i * kThreads < count) out[i * kThreads] = vector[i];
  }
}

// out[i] = source[indices[i]] for every leaf and the k indices. One block per tile.
template <class Index>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(KSAM_PARAMETER(Leaves) leaves, IndexList<Index> indices, int64_t k) {
  const PackedLeaf& leaf = leaves.at[leaf_of(leaves, blockIdx.x)];
  const int64_t tile = blockIdx.x - leaf.first_tile;
  switch (leaf.log2_vector) {
    case 4:
      return copy_tile<uint4>(leaf, indices, k, tile);
    case 3:
      return copy_tile<uint2>(leaf, indices, k, tile);
    case 2:
      return copy_tile<uint32_t>(leaf, indices, k, tile);
    case 1:
      return copy_tile<uint16_t>(leaf, indices, k, tile);
    default:
      return copy_tile<uint8_t>(leaf, indices, k, tile);
  }
}

PackedLeaf packed(const Leaf& leaf, uint32_t first_tile) {
  const uint64_t all = reinterpret_cast<uintptr_t>(leaf.source) |
                       reinterpret_cast<uintptr_t>(leaf.out) |
                       static_cast<uint64_t>(leaf.source_stride | leaf.row_bytes);
  int log2_vector = 0;
  while (2 << log2_vector <= kVectorBytes && all % (2 << log2_vector) == 0) ++log2_vector;
  return {leaf.source, leaf.out, leaf.row_bytes, leaf.source_stride, log2_vector, first_tile};
}

uint32_t tiles_of(const PackedLeaf& leaf, int64_t k) {
  const int64_t vectors = k * (leaf.row_bytes >> leaf.log2_vector);
  return static_cast<uint32_t>((vectors + kTileVectors - 1) / kTileVectors);
}

template <class Index>
void gather(const Leaf* leaves, int64_t leaf_count, const Tensor& t, int64_t rows, Stream stream) {
  const IndexList<Index> indices{t.as<const Index>(), t.strides[0], rows};
  for (int64_t done = 0; done < leaf_count;) {
    Leaves batch;
    uint32_t tiles = 0;
    for (batch.count = 0; batch.count < kMaxLeaves && done < leaf_count; ++batch.count, ++done) {
      batch.at[batch.count] = packed(leaves[done], tiles);
      tiles += tiles_of(batch.at[batch.count], t.numel);
    }
    launch(gather_kernel<Index>, tiles, kThreads, stream, batch, indices, t.numel);
  }
}

}  // namespace

void gather_rows(const Leaf* leaves, int64_t leaf_count, const Tensor& indices, int64_t rows,
                 Stream stream) {
  const auto run = indices.dtype == DType::i32 ? gather<int32_t> : gather<int64_t>;
  run(leaves, leaf_count, indices, rows, stream);
}

}  // namespace ksam::gpu
