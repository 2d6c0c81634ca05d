// Radix selection by one block, or by all blocks of a cooperative launch.
//
// The k-th largest key is found digit by digit, from the highest: count the keys of every digit
// among those that agree with the digits found so far, and take the digit in which the k-th lies.
// Positions then follow from how many selected keys come before an index, so the result is
// ascending and no order of atomics shows in it.
#pragma once

#include "common/block.cuh"
#include "topk/topk_key.h"

namespace ksam::gpu {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Losses in their order as unsigned integers; 16-bit floats as the float32 that they equal.
__device__ __forceinline__ uint32_t key_of(float x) { return float_key(__float_as_uint(x)); }
__device__ __forceinline__ uint32_t key_of(bf16 x) { return key_of(__bfloat162float(x)); }
__device__ __forceinline__ uint32_t key_of(f16 x) { return key_of(__half2float(x)); }
__device__ __forceinline__ uint64_t key_of(double x) {
  return float_key(static_cast<uint64_t>(__double_as_longlong(x)));
}

template <class T>
using KeyOf = decltype(key_of(T()));

// The losses of one block: all, or a share of them.
template <class T>
struct Share {
  const T* losses;  // [n]
  int64_t begin, end;
};

// Where the k-th largest key lies, as far as it is known.
template <class Key>
struct Threshold {
  Key key;         // its digits found so far
  Key known;       // a mask of them
  int64_t wanted;  // how many of the keys that agree in these digits are selected
};

struct SelectShared {
  uint32_t count[kDigits];
  uint32_t before_warp[kWarp];
  uint32_t equal_before_warp[kWarp];
  uint32_t digit;
  uint32_t above;  // keys with a larger digit
};

// One more key of `digit`. Losses are often alike in their first digits: what all lanes count at
// once is added once.
__device__ __forceinline__ void count_digit(uint32_t* count, bool counts, uint32_t digit) {
  const unsigned lanes = __ballot_sync(kAllLanes, counts);
  if (lanes == 0) return;
  const int leader = __ffs(static_cast<int>(lanes)) - 1;
  const uint32_t first = __shfl_sync(kAllLanes, digit, leader);
  if (__all_sync(kAllLanes, !counts || digit == first)) {
    if (lane_of_thread() == leader) atomicAdd(&count[first], static_cast<uint32_t>(__popc(lanes)));
  } else if (counts) {
    atomicAdd(&count[digit], 1u);
  }
}

// shared.count <- how many keys of the share have each digit, among those that agree with `at`.
template <class T, class Key>
__device__ void count_digits(const Share<T>& share, const Threshold<Key>& at, int shift,
                             SelectShared& shared) {
  for (int d = threadIdx.x; d < kDigits; d += blockDim.x) shared.count[d] = 0;
  __syncthreads();
  for (int64_t base = share.begin; base < share.end; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const Key key = i < share.end ? key_of(__ldcg(share.losses + i)) : Key(0);
    const bool counts = i < share.end && (key & at.known) == at.key;
    count_digit(shared.count, counts, static_cast<uint32_t>(key >> shift) & (kDigits - 1));
  }
  __syncthreads();
}

// The digit that holds the `wanted`-th largest of the counted keys, and how many lie above it.
// By the first warp, whose lanes have stretches of digits, the largest first.
__device__ inline void find_digit(int64_t wanted, SelectShared& shared) {
  constexpr int kStretch = kDigits / kWarp;
  if (warp_of_thread() == 0) {
    const int top = kDigits - 1 - lane_of_thread() * kStretch;
    uint32_t sum = 0;
    for (int j = 0; j < kStretch; ++j) sum += shared.count[top - j];
    uint32_t through = sum;  // keys in this and all higher stretches
    for (int by = 1; by < kWarp; by *= 2) {
      const uint32_t higher = __shfl_up_sync(kAllLanes, through, by);
      if (lane_of_thread() >= by) through += higher;
    }
    const unsigned reach = __ballot_sync(kAllLanes, through >= wanted);
    if (lane_of_thread() == __ffs(static_cast<int>(reach)) - 1) {
      uint32_t above = through - sum;
      int j = 0;
      while (above + shared.count[top - j] < wanted) above += shared.count[top - j++];
      shared.digit = static_cast<uint32_t>(top - j);
      shared.above = above;
    }
  }
  __syncthreads();
}

template <class Key>
__device__ __forceinline__ void narrow(Threshold<Key>* at, int shift, const SelectShared& shared) {
  at->key |= static_cast<Key>(shared.digit) << shift;
  at->known |= static_cast<Key>(kDigits - 1) << shift;
  at->wanted -= shared.above;
}

// Places of the digits, from the highest to 0. The last two overlap where the key is no multiple of
// a digit, which counts the same keys again.
template <class Key>
constexpr int kFirstShift = static_cast<int>(sizeof(Key)) * 8 - kDigitBits;

template <class Key>
constexpr int kPasses = (static_cast<int>(sizeof(Key)) * 8 + kDigitBits - 1) / kDigitBits;

// -1 after the last.
__device__ __forceinline__ int next_shift(int shift) {
  return shift == 0 ? -1 : shift > kDigitBits ? shift - kDigitBits : 0;
}

struct Counts {
  uint32_t greater, equal;
};

// The calling warp's stretch of the share, 32 keys at a time: visit(i, whether key i is greater than
// the threshold, whether it is equal, `before` plus the keys of the stretch before i). Returns
// `before` plus all of the stretch.
template <class T, class Key, class Visit>
__device__ Counts walk_warp(const Share<T>& share, Key threshold, Counts before,
                            const Visit& visit) {
  const int64_t rounds = (share.end - share.begin + blockDim.x - 1) / blockDim.x;
  const int64_t begin = share.begin + warp_of_thread() * rounds * kWarp;
  const unsigned below = (1u << lane_of_thread()) - 1;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t i = begin + round * kWarp + lane_of_thread();
    const bool real = i < share.end;
    const Key key = real ? key_of(__ldcg(share.losses + i)) : Key(0);
    const bool greater = real && key > threshold, equal = real && key == threshold;
    const unsigned greaters = __ballot_sync(kAllLanes, greater);
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    visit(i, greater, equal,
          Counts{before.greater + __popc(greaters & below), before.equal + __popc(equals & below)});
    before.greater += __popc(greaters);
    before.equal += __popc(equals);
  }
  return before;
}

// What the warps before each have, in shared memory; returns the block's counts.
template <class T, class Key>
__device__ Counts count_selected(const Share<T>& share, Key threshold, SelectShared& shared) {
  const Counts own =
      walk_warp(share, threshold, Counts{0, 0}, [](int64_t, bool, bool, Counts) {});
  if (lane_of_thread() == 0) {
    shared.before_warp[warp_of_thread()] = own.greater;
    shared.equal_before_warp[warp_of_thread()] = own.equal;
  }
  __syncthreads();
  Counts all{0, 0};
  Counts before{0, 0};
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp_of_thread()) before = all;
    all.greater += shared.before_warp[w];
    all.equal += shared.equal_before_warp[w];
  }
  __syncthreads();
  if (lane_of_thread() == 0) {
    shared.before_warp[warp_of_thread()] = before.greater;
    shared.equal_before_warp[warp_of_thread()] = before.equal;
  }
  __syncthreads();
  return all;
}

// out[...] <- the selected indices of the share, `before` selected or equal ones being in shares
// before it. Of keys at the threshold the first `wanted` are selected.
template <class T, class Key>
__device__ void write_selected(const Share<T>& share, const Threshold<Key>& at, Counts before,
                               const SelectShared& shared, int64_t* out) {
  const int w = warp_of_thread();
  const Counts start{before.greater + shared.before_warp[w],
                     before.equal + shared.equal_before_warp[w]};
  walk_warp(share, at.key, start, [&](int64_t i, bool greater, bool equal, Counts ahead) {
    const int64_t ties = ahead.equal < at.wanted ? ahead.equal : at.wanted;
    if (greater || (equal && ahead.equal < at.wanted)) out[ahead.greater + ties] = i;
  });
}

// out [k] <- indices of the k largest of losses [n], ascending. By one block whose threads are a
// multiple of a warp. Bytes moved: 6 readings of the losses (double: 8), which lie in the cache.
template <class T>
__device__ void select_by_block(const T* losses, int64_t n, int64_t k, SelectShared& shared,
                                int64_t* out) {
  using Key = KeyOf<T>;
  const Share<T> all{losses, 0, n};
  Threshold<Key> at{0, 0, k};
  for (int shift = kFirstShift<Key>; shift >= 0; shift = next_shift(shift)) {
    count_digits(all, at, shift, shared);
    find_digit(at.wanted, shared);
    narrow(&at, shift, shared);
  }
  count_selected(all, at.key, shared);
  write_selected(all, at, Counts{0, 0}, shared, out);
}

}  // namespace ksam::gpu
