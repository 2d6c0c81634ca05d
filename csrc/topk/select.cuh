// Radix selection by one block, or by all blocks of a cooperative launch.
//
// The k-th largest key is found digit by digit, from the highest: among the keys that agree with
// the digits found so far, count those that have each digit, and take the digit of the k-th. A
// selected key's position is the number of selected keys before it, so the result is ascending and
// does not depend on the order of atomics.
#pragma once

#include "common/block.cuh"
#include "topk/topk_key.h"

namespace ksam::gpu {

// Digits are small, so that a pass has few counts to add up between its barriers: four such passes
// are quicker than three of 11 bits.
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// Unsigned integers in the order of the losses. A 16-bit float has the key of an equal float32.
__device__ __forceinline__ uint32_t key_of(float x) { return float_key(__float_as_uint(x)); }
__device__ __forceinline__ uint32_t key_of(bf16 x) { return key_of(__bfloat162float(x)); }
__device__ __forceinline__ uint32_t key_of(f16 x) { return key_of(__half2float(x)); }
__device__ __forceinline__ uint64_t key_of(double x) {
  return float_key(static_cast<uint64_t>(__double_as_longlong(x)));
}

template <class T>
using KeyOf = decltype(key_of(T()));

// The losses that one block selects from: all, or a slice of them.
template <class T>
struct Slice {
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
  alignas(kVectorBytes) uint32_t count[kDigits];
  uint32_t of_warp[kWarp];
  uint32_t equal_of_warp[kWarp];
  uint32_t digit;
  uint32_t with_digit;
  uint32_t above;  // keys with a larger digit
};

// The calling warp's stretch of a slice, 32 neighbouring keys a round. The keys of the first kHeld
// rounds stay in registers from one walk to the next. The other rounds are loaded several at a
// time: loaded one by one, each would make the walk wait for memory.
template <class T, int kHeld>
class Stretch {
 public:
  using Key = KeyOf<T>;

  __device__ __forceinline__ explicit Stretch(const Slice<T>& slice)
      : losses_(slice.losses),
        end_(slice.end),
        rounds_(static_cast<int>((slice.end - slice.begin + blockDim.x - 1) / blockDim.x)),
        first_(slice.begin + int64_t{warp_of_thread()} * rounds_ * kWarp + lane_of_thread()) {
#pragma unroll
    for (int r = 0; r < kHeld; r += kAhead) load(r, held_ + r);
  }

  // visit(i, real, key) for the thread's key of every round: the key of loss i or, where `real` is
  // false, of no loss, as i lies past the end of the slice.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      if (r < rounds_) visit(index(r), is_real(r), held_[r]);
    }
    for (int first = kHeld; first < rounds_; first += kAhead) {
      Key ahead[kAhead];
      load(first, ahead);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int r = first + u;
        if (r < rounds_) visit(index(r), is_real(r), ahead[u]);
      }
    }
  }

 private:
  static constexpr int kAhead = kHeld / 2;
  static_assert(kHeld == 2 * kAhead, "the held rounds are loaded in two goes");

  __device__ __forceinline__ int64_t index(int r) const { return first_ + r * kWarp; }
  __device__ __forceinline__ bool is_real(int r) const { return index(r) < end_; }
  // keys <- those of kAhead rounds from `first` on, all loaded before the first key is made. A
  // conditional load would be waited for before the next one begins, so every load has a valid
  // address: past the end of the slice, that of its last loss, which visit() is told is not real.
  __device__ __forceinline__ void load(int first, Key* keys) const {
    T losses[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t i = index(first + u);
      losses[u] = __ldcg(losses_ + (i < end_ ? i : end_ - 1));
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) keys[u] = key_of(losses[u]);
  }

  const T* losses_;
  int64_t end_;
  int rounds_;
  int64_t first_;  // the thread's first key
  Key held_[kHeld];
};

// The sum over the calling thread's lane and all lanes before it.
__device__ __forceinline__ uint32_t sum_through(uint32_t value) {
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, value, by);
    if (lane_of_thread() >= by) value += before;
  }
  return value;
}

struct BlockSum {
  uint32_t before, all;  // over the warps before the calling one, and over all
};

// of_warp: the sum of each of the block's warps.
__device__ __forceinline__ BlockSum sum_before(const uint32_t* of_warp) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, w = warp_of_thread();
  const uint32_t own = lane_of_thread() < warps ? of_warp[lane_of_thread()] : 0;
  const uint32_t through = sum_through(own);
  return {__shfl_sync(kAllLanes, through - own, w), __shfl_sync(kAllLanes, through, kWarp - 1)};
}

// shared.count <- how many keys have each digit, among those that agree with `at`.
template <class T, int kHeld>
__device__ __forceinline__ void count_digits(const Stretch<T, kHeld>& stretch,
                                             const Threshold<KeyOf<T>>& at, int shift,
                                             SelectShared& shared) {
  for (int d = threadIdx.x; d < kDigits; d += blockDim.x) shared.count[d] = 0;
  __syncthreads();
  stretch.for_each([&](int64_t, bool real, KeyOf<T> key) {
    const uint32_t digit = static_cast<uint32_t>(key >> shift) & (kDigits - 1);
    if (real && (key & at.known) == at.key) atomicAdd(&shared.count[digit], 1u);
  });
  __syncthreads();
}

// shared <- the digit that holds the `wanted`-th largest of the counted keys, how many keys have
// it, and how many a larger one. The first warp does it: each lane has a run of neighbouring
// digits, the first lane the largest.
__device__ __forceinline__ void find_digit(int64_t wanted, SelectShared& shared) {
  constexpr int kRun = kDigits / kWarp;
  if (warp_of_thread() == 0) {
    const int low = kDigits - kRun * (lane_of_thread() + 1);
    uint32_t count[kRun];
    uint32_t sum = 0;
#pragma unroll
    for (int j = 0; j < kRun; ++j) sum += count[j] = shared.count[low + j];
    const uint32_t through = sum_through(sum);
    uint32_t above = through - sum;
    if (above < wanted && wanted <= through) {
      uint32_t digit = low + kRun - 1;
      bool is_found = false;
#pragma unroll
      for (int j = kRun - 1; j >= 0; --j) {
        is_found |= above + count[j] >= wanted;
        above += is_found ? 0 : count[j];
        digit -= is_found ? 0 : 1;
      }
      shared.digit = digit;
      shared.with_digit = shared.count[digit];
      shared.above = above;
    }
  }
  __syncthreads();
}

// Adds the digit to the known ones. True if all keys that have it are selected, so that their other
// digits do not matter: usually the case before the last pass, unless losses are tied.
template <class Key>
__device__ __forceinline__ bool narrow(Threshold<Key>* at, int shift, const SelectShared& shared) {
  at->key |= static_cast<Key>(shared.digit) << shift;
  at->known |= static_cast<Key>(kDigits - 1) << shift;
  at->wanted -= shared.above;
  return at->wanted == shared.with_digit;
}

// Passes over the keys, one for each digit, and the shift that brings the first pass's digit down.
template <class Key>
constexpr int kPasses = static_cast<int>(sizeof(Key)) * 8 / kDigitBits;

template <class Key>
constexpr int kFirstShift = (kPasses<Key> - 1) * kDigitBits;

struct Counts {
  uint32_t greater, equal;
};

// visit(i, greater, equal, counts) for every key of the warp's stretch: whether key i is greater
// than the threshold, or equal to it, in the known digits; and how many keys before it are greater,
// and how many equal, starting from `before`. Returns the counts after the whole stretch.
template <class T, int kHeld, class Visit>
__device__ __forceinline__ Counts walk_warp(const Stretch<T, kHeld>& stretch,
                                            const Threshold<KeyOf<T>>& at, Counts before,
                                            const Visit& visit) {
  const unsigned below = (1u << lane_of_thread()) - 1;
  stretch.for_each([&](int64_t i, bool real, KeyOf<T> key) {
    key &= at.known;
    const bool greater = real && key > at.key, equal = real && key == at.key;
    const unsigned greaters = __ballot_sync(kAllLanes, greater);
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    visit(i, greater, equal,
          Counts{before.greater + __popc(greaters & below), before.equal + __popc(equals & below)});
    before.greater += __popc(greaters);
    before.equal += __popc(equals);
  });
  return before;
}

struct Selected {
  Counts before, all;  // by the warps before the calling one, and by all of the block
};

template <class T, int kHeld>
__device__ __forceinline__ Selected count_selected(const Stretch<T, kHeld>& stretch,
                                                   const Threshold<KeyOf<T>>& at,
                                                   SelectShared& shared) {
  const Counts own = walk_warp(stretch, at, Counts{0, 0}, [](int64_t, bool, bool, Counts) {});
  if (lane_of_thread() == 0) {
    shared.of_warp[warp_of_thread()] = own.greater;
    shared.equal_of_warp[warp_of_thread()] = own.equal;
  }
  __syncthreads();
  const BlockSum greater = sum_before(shared.of_warp), equal = sum_before(shared.equal_of_warp);
  return {{greater.before, equal.before}, {greater.all, equal.all}};
}

// out[...] <- the selected indices of the stretch; `before` counts the keys before the stretch. Of
// the keys at the threshold, the first `wanted` are selected.
template <class T, int kHeld>
__device__ __forceinline__ void write_selected(const Stretch<T, kHeld>& stretch,
                                               const Threshold<KeyOf<T>>& at, Counts before,
                                               int64_t* out) {
  walk_warp(stretch, at, before, [&](int64_t i, bool greater, bool equal, Counts ahead) {
    const int64_t ties = ahead.equal < at.wanted ? ahead.equal : at.wanted;
    if (greater || (equal && ahead.equal < at.wanted)) out[ahead.greater + ties] = i;
  });
}

// out [k] <- indices of the k largest of losses [n], ascending. For one block, of whole warps.
// Bytes moved: the losses, which lie in the cache, are read once; those beyond the kHeld that each
// thread holds are read 6 times (double: 10).
template <int kHeld, class T>
__device__ __forceinline__ void select_by_block(const T* losses, int64_t n, int64_t k,
                                                SelectShared& shared, int64_t* out) {
  using Key = KeyOf<T>;
  const Stretch<T, kHeld> stretch({losses, 0, n});
  Threshold<Key> at{0, 0, k};
  for (int shift = kFirstShift<Key>; shift >= 0; shift -= kDigitBits) {
    count_digits(stretch, at, shift, shared);
    find_digit(at.wanted, shared);
    if (narrow(&at, shift, shared)) break;
  }
  write_selected(stretch, at, count_selected(stretch, at, shared).before, out);
}

}  // namespace ksam::gpu
