// Radix selection: the k-th largest key is found digit by digit from the top, each time keeping the
// keys that share the digits so far; one more pass writes the indices of the keys above it.
//
// Bytes moved: 4n read and 4n written for the keys, 4n for the first histogram, 4n for the indices
// and 8k written; the candidates after the first digit are few. All of it fits a cache.
#include "common/dispatch.h"
#include "topk/topk.h"
#include "topk/topk_key.h"

namespace ksam::KSAM_ISA {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Keys whose bits differ only below `bits` from those of one another.
template <class Key>
struct Keys {
  Key* keys;
  int64_t count;
  int bits;
};

template <class Key>
int width(Key x) {  // of the binary number
  return x == 0 ? 0 : sizeof(Key) * 8 - (sizeof(Key) == 8 ? __builtin_clzll(x) : __builtin_clz(x));
}

KSAM_INLINE uint32_t key_of(float x) { return float_key(bit_cast<uint32_t>(x)); }
KSAM_INLINE uint64_t key_of(double x) { return float_key(bit_cast<uint64_t>(x)); }

// Halves are compared as the floats that they are; the conversion keeps their order.
template <class T, class Key>
Keys<Key> make_keys(const T* losses, int64_t n, Key* keys) {
  Key low = ~Key{0}, high = 0;
  const auto add = [&](opmath_t<T> x, int64_t i) {
    const Key key = key_of(x);
    keys[i] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vec_t<T> x = load(losses + i);
    for (int j = 0; j < kLanes; ++j) add(x[j], i + j);
  }
  for (; i < n; ++i) add(load_one(losses + i), i);
  return {keys, n, width<Key>(low ^ high)};
}

// The bucket of the top digit that holds the rank-th largest key, and the rank inside of it.
template <class Key>
int find_digit(const Keys<Key>& from, int shift, Key mask, int64_t* rank) {
  // Two tables: neighbours with equal digits would otherwise wait for each other's count.
  uint32_t counts[2][kDigits] = {};
  const int64_t even = from.count & ~int64_t{1};
  for (int64_t i = 0; i < even; i += 2) {
    ++counts[0][(from.keys[i] >> shift) & mask];
    ++counts[1][(from.keys[i + 1] >> shift) & mask];
  }
  if (even < from.count) ++counts[0][(from.keys[even] >> shift) & mask];
  int digit = static_cast<int>(mask);
  for (;; --digit) {
    const int64_t count = int64_t{counts[0][digit]} + counts[1][digit];
    if (*rank <= count) return digit;
    *rank -= count;
  }
}

// The key of rank `rank` (1 is the largest). On return `rank` says how many of the keys equal to it
// are among the largest, and `equal` how many there are.
template <class Key>
Key kth_largest(Keys<Key> from, Key* candidates, int64_t* rank, int64_t* equal) {
  while (from.bits > 0) {
    const int digit_bits = from.bits < kDigitBits ? from.bits : kDigitBits;
    const int shift = from.bits - digit_bits;
    const Key mask = (Key{1} << digit_bits) - 1;
    const Key digit = find_digit(from, shift, mask, rank);
    int64_t kept = 0;
    for (int64_t i = 0; i < from.count; ++i) {  // in place from the second digit on
      const Key key = from.keys[i];
      candidates[kept] = key;
      kept += ((key >> shift) & mask) == digit;
    }
    from = {candidates, kept, shift};
  }
  *equal = from.count;
  return from.keys[0];
}

template <class Key>
void write_indices(const Key* keys, Key threshold, int64_t ties, bool all_ties, int64_t k,
                   int64_t* out) {
  int64_t written = 0;
  if (all_ties) {
    for (int64_t i = 0; written < k; ++i) {
      out[written] = i;
      written += keys[i] >= threshold;
    }
    return;
  }
  for (int64_t i = 0; written < k; ++i) {
    const bool tie = keys[i] == threshold && ties > 0;
    ties -= tie;
    out[written] = i;
    written += keys[i] > threshold || tie;
  }
}

template <class T, class Key>
void select(const T* losses, int64_t n, int64_t k, Key* scratch, int64_t* out) {
  const Keys<Key> keys = make_keys(losses, n, scratch);
  int64_t ties = k, equal = 0;
  const Key threshold = kth_largest(keys, scratch + n, &ties, &equal);
  write_indices(scratch, threshold, ties, ties == equal, k, out);
}

}  // namespace

void topk_indices(const Tensor& losses, int64_t k, void* scratch, int64_t* out) {
  on_floating(losses.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 8) {
      select(losses.as<T>(), losses.numel, k, static_cast<uint64_t*>(scratch), out);
    } else {
      select(losses.as<T>(), losses.numel, k, static_cast<uint32_t*>(scratch), out);
    }
  });
}

}  // namespace ksam::KSAM_ISA
