// Selection by bisection. The range of keys that holds the k-th largest is halved by counting the
// keys in its upper half; every few halvings the keys outside of it are dropped; a last pass writes
// the indices of the keys from the threshold up. Counting costs the same for any losses, spread,
// close together or equal, and goes as fast as keys can be loaded (the increments of a histogram
// wait for one another).
//
// Bytes moved for n float losses: 4n read and 4n written to make the keys, then 4n read for their
// range, again for each of kHalvings counts, to drop keys (few are left) and for the indices; 8k
// written. Everything but the losses and the indices stays in a cache. Losses with gaps between
// them are first copied to the memory that later holds candidates.
#include <limits>
#include <type_traits>

#include "common/dispatch.h"
#include "common/lanes.h"
#include "topk/topk.h"
#include "topk/topk_key.h"

namespace ksam::KSAM_ISA {
namespace {

// Counts between two passes that drop keys. Eight of them leave about one key in a hundred.
constexpr int kHalvings = 8;

// Keys are signed, which every instruction set can compare.
KSAM_INLINE int32_t signed_key(uint32_t bits) {
  return static_cast<int32_t>(float_key(bits) ^ 0x80000000u);
}
KSAM_INLINE int64_t signed_key(uint64_t bits) {
  return static_cast<int64_t>(float_key(bits) ^ 0x8000000000000000ull);
}

// Fills up the last block. It is below the key of every loss.
template <class Key>
constexpr Key kPadding = std::numeric_limits<Key>::min();

// Keys [count], then padding to a whole number of blocks.
template <class Key>
struct Keys {
  Key* keys;
  int64_t count;
};

template <class Key>
Keys<Key> padded(Key* keys, int64_t count) {
  for (int64_t i = count; i < topk_padded(count); ++i) keys[i] = kPadding<Key>;
  return {keys, count};
}

// The losses without gaps: in place, or copied to `buffer` [n].
template <class T>
const T* gathered(const Tensor& losses, T* buffer) {
  const int64_t stride = losses.strides[0];
  if (stride == 1) return losses.as<T>();
  for (int64_t i = 0; i < losses.numel; ++i) {
    std::memcpy(buffer + i, losses.as<T>() + i * stride, sizeof(T));
  }
  return buffer;
}

// The keys [topk_padded(n)] of floats [n], float or double; both may be the same memory.
template <class Key>
Keys<Key> make_keys(const void* floats, int64_t n, Key* keys) {
  const auto* bits = static_cast<const std::make_unsigned_t<Key>*>(floats);
  for (int64_t i = 0; i < n; ++i) keys[i] = signed_key(bits[i]);
  return padded(keys, n);
}

// Halves [n] as floats [topk_padded(n)], which have the same order.
template <class Half>
const float* widen(const Half* losses, int64_t n, float* floats) {
  int64_t i = 0;
  using V = Lanes<Half>;
  for (; i + kLanes <= n; i += kLanes) store_lanes(floats + i, load_lanes<V>(losses + i));
  if (i == n) return floats;
  Half rest[kLanes] = {};
  std::memcpy(rest, losses + i, (n - i) * sizeof(Half));
  store_lanes(floats + i, load_lanes<V>(rest));
  return floats;
}

template <class Key>
struct Range {
  Key low, high;  // both inclusive
};

template <class Key>
Range<Key> range_of(const Keys<Key>& from) {
  Key low = from.keys[0], high = low;
  for (int64_t i = 1; i < from.count; ++i) {
    const Key key = from.keys[i];
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {low, high};
}

template <class Key>
int64_t count_from(const Keys<Key>& from, Key least) {
  // As wide as a key, so that a vector of counts has as many lanes as one of keys.
  std::make_unsigned_t<Key> count = 0;
#pragma GCC unroll 4  // or half of the instructions would be loop overhead
  for (int64_t i = 0; i < from.count; ++i) count += from.keys[i] >= least;
  return count;
}

// Bit i says whether keys[i] > bound; keys [kTopkBlock].
#if defined(__AVX512F__)
template <class Key>
KSAM_INLINE uint64_t mask_above(const Key* keys, Key bound) {
  constexpr int kCount = 64 / sizeof(Key);
  uint64_t mask = 0;
  for (int i = 0; i < kTopkBlock; i += kCount) {
    const __m512i some = load_raw<__m512i>(keys + i);
    if constexpr (sizeof(Key) == 4) {
      mask |= uint64_t{_mm512_cmpgt_epi32_mask(some, _mm512_set1_epi32(bound))} << i;
    } else {
      mask |= uint64_t{_mm512_cmpgt_epi64_mask(some, _mm512_set1_epi64(bound))} << i;
    }
  }
  return mask;
}
#elif defined(__AVX2__)
KSAM_INLINE uint64_t mask_above(const int32_t* keys, int32_t bound) {
  uint64_t mask = 0;
  for (int i = 0; i < kTopkBlock; i += 8) {
    const __m256i eight = load_raw<__m256i>(keys + i);
    const __m256i above = _mm256_cmpgt_epi32(eight, _mm256_set1_epi32(bound));
    mask |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above))) << i;
  }
  return mask;
}

KSAM_INLINE uint64_t mask_above(const int64_t* keys, int64_t bound) {
  uint64_t mask = 0;
  for (int i = 0; i < kTopkBlock; i += 4) {
    const __m256i four = load_raw<__m256i>(keys + i);
    const __m256i above = _mm256_cmpgt_epi64(four, _mm256_set1_epi64x(bound));
    mask |= static_cast<uint64_t>(_mm256_movemask_pd(_mm256_castsi256_pd(above))) << i;
  }
  return mask;
}
#else
template <class Key>
KSAM_INLINE uint64_t mask_above(const Key* keys, Key bound) {
  uint8_t flags[kTopkBlock];
  for (int i = 0; i < kTopkBlock; ++i) flags[i] = keys[i] > bound;
  uint64_t mask = 0;
  for (int i = 0; i < kTopkBlock; i += 8) {
    // Eight bytes of 0 or 1 become one: the product brings byte j to bit 56 + j.
    mask |= (load_raw<uint64_t>(flags + i) * 0x0102040810204080ull) >> 56 << i;
  }
  return mask;
}
#endif

// body(i) for every bit i that is set, upwards.
template <class Body>
KSAM_INLINE void for_each_bit(uint64_t mask, const Body& body) {
  for (; mask != 0; mask &= mask - 1) body(__builtin_ctzll(mask));
}

// The keys in the range, copied to `out`, which may be the memory that they are in.
template <class Key>
Keys<Key> filtered(const Keys<Key>& from, Range<Key> range, Key* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < from.count; i += kTopkBlock) {
    const Key* block = from.keys + i;
    const uint64_t inside = mask_above(block, range.low - 1) & ~mask_above(block, range.high);
    for_each_bit(inside, [&](int j) { out[count++] = block[j]; });
  }
  return padded(out, count);
}

// Keys above `key` are chosen, and of those equal to it the first `ties`, which may be all.
template <class Key>
struct Threshold {
  Key key;
  int64_t ties;
  bool all_ties;
};

// candidates: memory [topk_padded(count)] for the keys that are left after some halvings.
template <class Key>
Threshold<Key> find_threshold(Keys<Key> from, int64_t k, Key* candidates) {
  for (;;) {
    auto [low, high] = range_of(from);
    // How many keys are >= low, and how many > high; k is between the two, as the k-th largest key
    // is in [low, high].
    int64_t from_low = from.count, above_high = 0;
    for (int i = 0; i < kHalvings && low < high && from_low > k; ++i) {
      using Unsigned = std::make_unsigned_t<Key>;
      const Unsigned half = (static_cast<Unsigned>(high) - static_cast<Unsigned>(low)) / 2;
      const Key middle = static_cast<Key>(static_cast<Unsigned>(low) + half + 1);
      const int64_t count = count_from(from, middle);
      if (count >= k) {
        low = middle;
        from_low = count;
      } else {
        high = middle - 1;
        above_high = count;
      }
    }
    if (from_low == k || low == high) return {low, k - above_high, from_low == k};
    from = filtered(from, {low, high}, candidates);
    k -= above_high;
  }
}

template <class Key>
void write_indices(const Keys<Key>& from, Threshold<Key> threshold, int64_t* out) {
  int64_t ties = threshold.ties;
  for (int64_t i = 0; i < from.count; i += kTopkBlock) {
    const Key* block = from.keys + i;
    uint64_t chosen = mask_above(block, threshold.key - 1);
    if (!threshold.all_ties) {
      uint64_t tied = chosen & ~mask_above(block, threshold.key);
      for (; tied != 0 && ties > 0; --ties) tied &= tied - 1;
      chosen &= ~tied;
    }
    for_each_bit(chosen, [&](int j) { *out++ = i + j; });
  }
}

// floats [n], float or double; scratch [2 * topk_padded(n)], which may begin with them.
template <class Key>
void select(const void* floats, int64_t n, int64_t k, Key* scratch, int64_t* out) {
  const Keys<Key> keys = make_keys(floats, n, scratch);
  write_indices(keys, find_threshold(keys, k, scratch + topk_padded(n)), out);
}

}  // namespace

void topk_indices(const Tensor& losses, int64_t k, void* scratch, int64_t* out) {
  on_floating(losses.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Key = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    const int64_t n = losses.numel;
    Key* keys = static_cast<Key*>(scratch);
    const T* plain = gathered(losses, reinterpret_cast<T*>(keys + topk_padded(n)));
    if constexpr (sizeof(T) == 2) {
      select(widen(plain, n, static_cast<float*>(scratch)), n, k, keys, out);
    } else {
      select(plain, n, k, keys, out);
    }
  });
}

}  // namespace ksam::KSAM_ISA
