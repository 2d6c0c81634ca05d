// Reads and writes a thread's portion of a row: in pieces of as many elements as a vector of memory
// holds, several of which are loaded before the first is used.
#pragma once

#include "common/block.cuh"

namespace ksam::gpu {

// Pieces of a batch, all of which a thread loads before it uses the first.
constexpr int kUnroll = gpu_or_simt(4, 2);

// Batches of a span, which follow each other in a part of a row. A kernel that has the registers
// loads all of them before it uses the first: with 32 warps per multiprocessor, an H200 reads 3.9
// TB/s with 64 bytes per thread in flight, and 4.4 with 128.
constexpr int kSpan = 2;

// Neighbouring threads that share a row, or part `part` of its `parts`. The calling thread is
// number `thread` of `count`. kThreads: their count if it is known to the compiler, else 0.
template <int kThreads>
struct Team {
  int thread, count, part, parts;

  __device__ __forceinline__ int threads() const { return kThreads > 0 ? kThreads : count; }

  // The thread's number among those of all parts. Where threads() is 1, it is the same in a whole
  // block, but the compiler must not know that: for planes, it would keep addresses in more
  // registers than there are.
  __device__ __forceinline__ int64_t place() const { return int64_t{part} * threads() + thread; }
  __device__ __forceinline__ int64_t places() const { return int64_t{parts} * threads(); }
};

template <class T, int N>
struct Elements {
  T at[N];
};

// How many elements past a vector's boundary p - lead lies.
template <class T>
__device__ __forceinline__ int offset_of(const T* p, int lead = 0) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(p) - lead * sizeof(T)) % kVectorBytes /
                          sizeof(T));
}

// Part of a row: elements first + [begin, end), of at most N.
struct Piece {
  int64_t first;
  int begin, end;

  __device__ __forceinline__ bool has(int j) const { return j >= begin && j < end; }
};

// N elements as they were loaded. 16-bit elements stay in pairs until they are used: taking them
// apart at once would mean waiting for each load before the next begins.
template <class T, int N>
struct Packed {
  uint32_t words[N * sizeof(T) / 4];
};

template <class T, int N>
__device__ __forceinline__ void put(Packed<T, N>* to, int j, T value) {
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (j % 2 == 0) to->words[j / 2] = 0;
    to->words[j / 2] |= uint32_t{bits} << (j % 2 * 16);
  } else {
    memcpy(to->words + j * sizeof(T) / 4, &value, sizeof value);
  }
}

template <int N>
__device__ __forceinline__ float element(const Packed<float, N>& from, int j) {
  return __uint_as_float(from.words[j]);
}
template <int N>
__device__ __forceinline__ double element(const Packed<double, N>& from, int j) {
  double value;
  memcpy(&value, from.words + 2 * j, sizeof value);
  return value;
}
template <int N>
__device__ __forceinline__ float element(const Packed<bf16, N>& from, int j) {
  const uint32_t pair = from.words[j / 2];
  return __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
}
template <int N>
__device__ __forceinline__ float element(const Packed<f16, N>& from, int j) {
  __half2 pair;
  memcpy(&pair, &from.words[j / 2], sizeof pair);
  return j % 2 == 0 ? __low2float(pair) : __high2float(pair);
}

template <int N, class T>
__device__ __forceinline__ Packed<T, N> filled(T value) {
  Packed<T, N> to;
#pragma unroll
  for (int j = 0; j < N; ++j) put(&to, j, value);
  return to;
}

// a and b hold two 16-bit numbers each: returns the larger of the low ones and the larger of the
// high ones. Of a number and NaN, that is the number.
template <class Pair>
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
  Pair x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  x = __hmax2(x, y);
  memcpy(&a, &x, sizeof a);
  return a;
}
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b, bf16) {
  return larger_halves<__nv_bfloat162>(a, b);
}
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b, f16) {
  return larger_halves<__half2>(a, b);
}

template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_whole(const T* p) {
  constexpr int kWords = kVectorBytes / 4;
  Packed<T, N> to;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(to.words)) / 4; i += kWords) {
    const auto vector = load_vector<uint32_t, kWords>(reinterpret_cast<const uint32_t*>(p) + i);
#pragma unroll
    for (int j = 0; j < kWords; ++j) to.words[i + j] = vector.at[j];
  }
  return to;
}

// N elements of 2 or 4 bytes from p on, from the two vectors that they lie in; the first vector
// begins `offset` elements before p.
template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_shifted(const T* p, int offset) {
  static_assert(N * sizeof(T) == kVectorBytes && sizeof(T) <= 4);
  const auto both = load_whole<2 * N>(p - offset);
  const int words = offset * static_cast<int>(sizeof(T)) / 4;
  uint32_t at[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) at[i] = both.words[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) at[i] = words & 2 ? at[i + 2] : at[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) at[i] = words & 1 ? at[i + 1] : at[i];
  Packed<T, N> to;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to.words[i] = at[i];
    if constexpr (sizeof(T) == 2) {
      to.words[i] = static_cast<uint32_t>((uint64_t{at[i + 1]} << 32 | at[i]) >> (offset % 2 * 16));
    }
  }
  return to;
}

// The elements of a piece, and `fill` outside it. aligned: row + piece.first is aligned to vectors.
template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_piece(const T* row, const Piece& piece, bool aligned,
                                                   T fill) {
  const T* p = row + piece.first;
  const bool whole = piece.begin == 0 && piece.end == N;
  if (whole && aligned) return load_whole<N>(p);
  Packed<T, N> to;
  if (whole) {
#pragma unroll
    for (int j = 0; j < N; ++j) put(&to, j, p[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) put(&to, j, piece.has(j) ? p[j] : fill);
  }
  return to;
}

// Two numbers rounded to 16 bits, in one word, by the one instruction that rounds both.
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, f16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Rounds the elements of a piece, which lies at a vector's boundary, and stores them.
template <int N, class T, class A>
__device__ __forceinline__ void store_piece(T* row, const Piece& piece,
                                            const Elements<A, N>& from) {
  T* p = row + piece.first;
  if (piece.begin != 0 || piece.end != N) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (piece.has(j)) p[j] = Rounded<T>::from(from.at[j]);
    }
  } else {
    uint4 words;
    if constexpr (sizeof(T) == 2) {
      words = {rounded_pair(from.at[0], from.at[1], T()), rounded_pair(from.at[2], from.at[3], T()),
               rounded_pair(from.at[4], from.at[5], T()),
               rounded_pair(from.at[6], from.at[7], T())};
    } else {
      static_assert(sizeof(from) == kVectorBytes);
      memcpy(&words, &from, kVectorBytes);
    }
    KSAM_CHECK_ALIGNED(p, kVectorBytes);
    __stcg(reinterpret_cast<uint4*>(p), words);  // nvcc would split a plain store
  }
}

// How the pieces of a batch are loaded:
//   aligned   all are whole, at vectors' boundaries
//   last      each is empty, or whole and at a vector's boundary
//   shifted   all are whole, and each lies in two vectors that hold nothing but the row
//   careful   element by element, as none of the above is certain
enum class Loads { aligned, last, shifted, careful };

// Loads pieces of N elements that begin at first + [0, kUnroll) * step, in the fastest way there
// is.
template <int N, bool kMayShift, class Item, class Load>
__device__ __forceinline__ void load_batch(int64_t first, int64_t step, int64_t columns, int offset,
                                           const Load& load, Piece (&pieces)[kUnroll],
                                           Item (&items)[kUnroll]) {
  const int64_t end = first + (kUnroll - 1) * step + N;
  if (offset == 0 && first >= 0 && end <= columns) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      pieces[u] = {first + u * step, 0, N};
      items[u] = load(pieces[u], Loads::aligned);
    }
  } else if (offset == 0 && first >= 0 && (columns - first) % N == 0) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + u * step;
      pieces[u] = {at, 0, at < columns ? N : 0};
      items[u] = load(pieces[u], Loads::last);
    }
  } else if (kMayShift && offset > 0 && first >= offset && end + N - offset <= columns) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      pieces[u] = {first + u * step, 0, N};
      items[u] = load(pieces[u], Loads::shifted);
    }
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + u * step, left = columns - at;
      pieces[u] = {at, at < 0 ? static_cast<int>(-at) : 0,
                   left < N ? static_cast<int>(left < 0 ? 0 : left) : N};
      items[u] = load(pieces[u], Loads::careful);
    }
  }
}

// Walks over the calling thread's portion of a row in batches of kUnroll pieces of N elements.
// load(piece, loads) makes an item of each piece, and use(pieces, items) returns whether to go on.
// The first piece of the row begins `lead` elements before the row, so that pieces can begin at
// vectors' boundaries of other memory instead of the row's. All pieces lie `offset` elements past a
// vector's boundary; offset < 0 means that they have to be loaded carefully. A part takes kBatches
// batches at a time.
template <int N, bool kMayShift, int kBatches = 1, int kThreads, class Load, class Use>
__device__ __forceinline__ void for_each_batch(int64_t columns, int lead, int offset,
                                               const Team<kThreads>& team, const Load& load,
                                               const Use& use) {
  using Item = decltype(load(Piece{}, Loads::careful));
  const int64_t step = int64_t{team.threads()} * N, batch = kUnroll * step;
  const int64_t skipped = (team.parts - 1) * kBatches * batch;
  int64_t first = team.part * kBatches * batch + team.thread * N - lead;
  for (int done = 1; first < columns; ++done, first += batch) {
    Piece pieces[kUnroll];
    Item items[kUnroll];
    load_batch<N, kMayShift>(first, step, columns, offset, load, pieces, items);
    if (!use(pieces, items)) return;
    if (done % kBatches == 0) first += skipped;
  }
}

// How many of a span's batches are loaded at once. Before sm_90 it is one: with two, registers
// spill, and older memory needs fewer bytes in flight.
template <int N, int kBatches>
__device__ __forceinline__ constexpr int batches_at_once() {
#if defined(KSAM_SIMT)  // both ways, by the dtype
  return N == kPerVector<bf16> ? 1 : kBatches;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 1;
#else
  return kBatches;
#endif
}

constexpr int64_t kMostWholeVectors = int64_t{1} << 30;  // so that 32 bits count them

// for_each_batch() for a row of fewer than kMostWholeVectors whole vectors at vectors' boundaries;
// the result has the same bits. As there is only one way to load the vectors, there are enough
// registers to load a whole span at once.
template <int N, int kBatches, int kThreads, class Load, class Use>
__device__ __forceinline__ void for_each_whole_batch(int64_t columns, const Team<kThreads>& team,
                                                     const Load& load, const Use& use) {
  using Item = decltype(load(Piece{}, Loads::careful));
  constexpr int kAtOnce = batches_at_once<N, kBatches>(), kPieces = kAtOnce * kUnroll;
  const int vectors = static_cast<int>(columns / N), threads = team.threads();
  const int batch = kUnroll * threads, skipped = (team.parts - 1) * kBatches * batch;
  int first = team.part * kBatches * batch + team.thread;
  for (int done = kAtOnce; first < vectors; done += kAtOnce, first += kAtOnce * batch) {
    Piece pieces[kAtOnce][kUnroll];
    Item items[kAtOnce][kUnroll];
    if (first + (kPieces - 1) * threads < vectors) {
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        Piece& piece = pieces[u / kUnroll][u % kUnroll];
        piece = {int64_t{first + u * threads} * N, 0, N};
        items[u / kUnroll][u % kUnroll] = load(piece, Loads::aligned);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        Piece& piece = pieces[u / kUnroll][u % kUnroll];
        const int at = first + u * threads;
        piece = {int64_t{at} * N, 0, at < vectors ? N : 0};
        items[u / kUnroll][u % kUnroll] = load(piece, Loads::last);
      }
    }
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      if (b > 0 && first + b * batch >= vectors) return;
      if (!use(pieces[b], items[b])) return;
    }
    if (kAtOnce == kBatches || done % kBatches == 0) first += skipped;
  }
}

}  // namespace ksam::gpu
