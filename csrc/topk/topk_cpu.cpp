// Selection by bisection: the range of keys that holds the k-th largest is halved by counting the
// keys in its upper half, and every few halvings the keys outside of it are dropped; one more pass
// writes the indices of the keys from the threshold up. Counting reads keys as fast as they can be
// loaded, whatever their distribution: a histogram waits for its own increments.
//
// Bytes moved, for n float losses: 4n read and 4n written for the keys, 4n for their range, 4n for
// each of kHalvings counts, 4n to drop keys (few are left), 4n for the indices and 8k written. All
// of it fits a cache.
#include <type_traits>

#include "common/dispatch.h"
#include "topk/topk.h"
#include "topk/topk_key.h"

namespace ksam::KSAM_ISA {
namespace {

// Between two passes that drop keys: about one in twenty is left after six.
constexpr int kHalvings = 6;

// Keys are signed, which every instruction set can compare.
KSAM_INLINE int32_t key_of(float x) {
  return static_cast<int32_t>(float_key(bit_cast<uint32_t>(x)) ^ 0x80000000u);
}
KSAM_INLINE int64_t key_of(double x) {
  return static_cast<int64_t>(float_key(bit_cast<uint64_t>(x)) ^ 0x8000000000000000ull);
}

// No loss has this key.
template <class Key>
constexpr Key kPadding = static_cast<Key>(Key{1} << (sizeof(Key) * 8 - 2)) * -2;

// Keys [count], padded to whole blocks of kTopkBlock.
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

// Halves are compared as the floats that they are; the conversion keeps their order.
template <class T, class Key>
Keys<Key> make_keys(const T* losses, int64_t n, Key* keys) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    opmath_t<T> x[kLanes];
    store(x, load(losses + i));
    for (int j = 0; j < kLanes; ++j) keys[i + j] = key_of(x[j]);
  }
  for (; i < n; ++i) keys[i] = key_of(load_one(losses + i));
  return padded(keys, n);
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
  std::make_unsigned_t<Key> count = 0;  // as wide as a key, so that both fill a vector alike
  for (int64_t i = 0; i < from.count; ++i) count += from.keys[i] >= least;
  return count;
}

// Bit i says whether wanted(keys[i]), keys [kTopkBlock].
template <class Key, class Wanted>
KSAM_INLINE uint64_t mask_of(const Key* keys, const Wanted& wanted) {
  uint8_t flags[kTopkBlock];
  for (int i = 0; i < kTopkBlock; ++i) flags[i] = wanted(keys[i]);
  uint64_t mask = 0;
  for (int i = 0; i < kTopkBlock; i += 8) {
    // Eight bytes of 0 or 1 become eight bits: the product moves byte j to bit 56 + j.
    mask |= (load_raw<uint64_t>(flags + i) * 0x0102040810204080ull) >> 56 << i;
  }
  return mask;
}

// body(i) for every bit i that is set, upwards.
template <class Body>
KSAM_INLINE void for_each_bit(uint64_t mask, const Body& body) {
  for (; mask != 0; mask &= mask - 1) body(__builtin_ctzll(mask));
}

// The keys in the range, moved to `kept`, which may be where they are.
template <class Key>
Keys<Key> keep(const Keys<Key>& from, Range<Key> range, Key* kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < from.count; i += kTopkBlock) {
    const Key* block = from.keys + i;
    const auto inside = [&](Key key) { return key >= range.low && key <= range.high; };
    for_each_bit(mask_of(block, inside), [&](int j) { kept[count++] = block[j]; });
  }
  return padded(kept, count);
}

// Keys above `key` are chosen, and of those equal to it the first `ties`, which may be all.
template <class Key>
struct Threshold {
  Key key;
  int64_t ties;
  bool all_ties;
};

template <class Key>
Threshold<Key> find_threshold(Keys<Key> from, int64_t k, Key* candidates) {
  for (;;) {
    auto [low, high] = range_of(from);
    int64_t from_low = from.count, above_high = 0;  // keys: from_low >= k > above_high
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
    if (low == high || from_low == k) return {low, k - above_high, from_low == k};
    from = keep(from, {low, high}, candidates);
    k -= above_high;
  }
}

template <class Key>
void write_indices(const Keys<Key>& from, Threshold<Key> threshold, int64_t* out) {
  int64_t ties = threshold.ties;
  for (int64_t i = 0; i < from.count; i += kTopkBlock) {
    const Key* block = from.keys + i;
    uint64_t chosen = mask_of(block, [&](Key key) { return key >= threshold.key; });
    if (!threshold.all_ties) {
      const uint64_t above = mask_of(block, [&](Key key) { return key > threshold.key; });
      for_each_bit(chosen & ~above, [&](int j) {
        if (--ties < 0) chosen ^= uint64_t{1} << j;
      });
    }
    for_each_bit(chosen, [&](int j) { *out++ = i + j; });
  }
}

// scratch [2 * topk_padded(n)]
template <class T, class Key>
void select(const T* losses, int64_t n, int64_t k, Key* scratch, int64_t* out) {
  const Keys<Key> keys = make_keys(losses, n, scratch);
  write_indices(keys, find_threshold(keys, k, scratch + topk_padded(n)), out);
}

}  // namespace

void topk_indices(const Tensor& losses, int64_t k, void* scratch, int64_t* out) {
  on_floating(losses.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 8) {
      select(losses.as<T>(), losses.numel, k, static_cast<int64_t*>(scratch), out);
    } else {
      select(losses.as<T>(), losses.numel, k, static_cast<int32_t*>(scratch), out);
    }
  });
}

}  // namespace ksam::KSAM_ISA
