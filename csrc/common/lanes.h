// Sixteen lanes as a tree of registers, for kernels that compare, select or add up.
//
// GCC keeps a vector that is wider than the machine's registers in memory from one iteration of a
// loop to the next, and compares it lane by lane. A pair of registers stays in registers. So
// Lanes<float> is one register of AVX-512, a Pair of two of AVX2, a Pair of Pairs of SSE or NEON,
// and every function here goes down the tree. Lane i is added to lane i + 8, then i + 4, i + 2 and
// i + 1: the same order on every machine.
#pragma once

#include "common/simd.h"

namespace ksam::KSAM_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class V>
struct Pair {
  V low, high;
};

template <int kBytes>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<8> {
  using type = double;
};

template <class V>
struct LaneTraits {
  using element = typename ElementOf<sizeof(V{}[0])>::type;
  static constexpr bool kIsPair = false;
  static constexpr int kCount = sizeof(V) / sizeof(element);
};
template <class V>
struct LaneTraits<Pair<V>> {
  using element = typename LaneTraits<V>::element;
  static constexpr bool kIsPair = true;
  static constexpr int kCount = 2 * LaneTraits<V>::kCount;
};

template <class T, int kCount, bool kFits = kCount * sizeof(T) <= kRegisterBytes>
struct LanesOf {
  using type = Pair<typename LanesOf<T, kCount / 2>::type>;
};
template <class T, int kCount>
struct LanesOf<T, kCount, true> {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

// Sixteen values of the arithmetic on T.
template <class T>
using Lanes = typename LanesOf<Opmath<T>, kLanes>::type;

// As many of them as one register holds.
template <class T>
using Register = typename LanesOf<Opmath<T>, kRegisterBytes / sizeof(Opmath<T>)>::type;

#define KSAM_PAIRWISE(op)                                               \
  template <class V>                                                    \
  KSAM_INLINE Pair<V> operator op(const Pair<V>& a, const Pair<V>& b) { \
    return {a.low op b.low, a.high op b.high};                          \
  }
KSAM_PAIRWISE(+)
KSAM_PAIRWISE(-)
KSAM_PAIRWISE(*)
KSAM_PAIRWISE(/)
#undef KSAM_PAIRWISE

template <class V>
KSAM_INLINE V all_lanes(typename LaneTraits<V>::element value) {
  if constexpr (LaneTraits<V>::kIsPair) {
    using Part = decltype(V::low);
    return {all_lanes<Part>(value), all_lanes<Part>(value)};
  } else {
    return broadcast<V>(value);
  }
}

template <class V, class T>
KSAM_INLINE V load_lanes(const T* p) {
  if constexpr (LaneTraits<V>::kIsPair) {
    using Part = decltype(V::low);
    return {load_lanes<Part>(p), load_lanes<Part>(p + LaneTraits<Part>::kCount)};
  } else if constexpr (sizeof(T) == 2) {
    return to_float(load_raw<typename LikeOf<V>::u16>(p), T{});
  } else {
    return load_raw<V>(p);
  }
}

#if defined(__AVX2__)
// One instruction packs two registers, where the template below would store one after the other.
KSAM_INLINE void store_lanes(bf16* p, const Pair<f32x8>& x) {
  const __m256i low = bit_cast<__m256i>(rounded_to_bf16(x.low));
  const __m256i high = bit_cast<__m256i>(rounded_to_bf16(x.high));
  const __m256i by_halves = _mm256_packus_epi32(low, high);
  const __m256i packed = _mm256_permute4x64_epi64(by_halves, 0b11011000);
  std::memcpy(p, &packed, sizeof(packed));
}
#endif

template <class V, class T>
KSAM_INLINE void store_lanes(T* p, const V& x) {
  if constexpr (LaneTraits<V>::kIsPair) {
    store_lanes(p, x.low);
    store_lanes(p + LaneTraits<V>::kCount / 2, x.high);
  } else if constexpr (sizeof(T) == 2) {
    const auto h = from_float(x, T{});
    std::memcpy(p, &h, sizeof(h));
  } else {
    std::memcpy(p, &x, sizeof(x));
  }
}

// body(i) at vectors that cover [0, n), n >= kLanes; the last may cover elements a second time.
template <class Body>
KSAM_INLINE void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i);
  if (i < n) body(n - kLanes);
}

// Converts n numbers from one dtype to another; from double to a half through float, as torch does.
template <class From, class To>
void convert(const From* from, int64_t n, To* to) {
  if constexpr (sizeof(Opmath<From>) == sizeof(Opmath<To>)) {
    if (n >= kLanes) {
      return for_each_vector(n, [&](int64_t i) KSAM_INLINE_LAMBDA {
        store_lanes(to + i, load_lanes<Lanes<From>>(from + i));
      });
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    store_one(to + i, static_cast<Opmath<To>>(load_one(from + i)));
  }
}

// The larger; b where one of the two is NaN.
KSAM_INLINE float larger(float a, float b) { return a > b ? a : b; }
KSAM_INLINE double larger(double a, double b) { return a > b ? a : b; }
template <class V>
KSAM_INLINE V larger(const V& a, const V& b) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {larger(a.low, b.low), larger(a.high, b.high)};
  } else {
    return a > b ? a : b;
  }
}

template <class V>
KSAM_INLINE V magnitude(const V& x) {
  return larger(x, V{} - x);  // NaN stays NaN
}

// x in the lanes where mask is not 0, and 0 in the others, even where x is infinite or NaN.
template <class V>
KSAM_INLINE V masked(const V& x, const V& mask) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {masked(x.low, mask.low), masked(x.high, mask.high)};
  } else {
    return mask != 0 ? x : V{};
  }
}

// x in the lanes where it is not -infinity, 0 in the others: origin() of loss/loss_row.h.
template <class V>
KSAM_INLINE V origins(const V& x) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {origins(x.low), origins(x.high)};
  } else {
    return x == broadcast<V>(-__builtin_huge_valf()) ? V{} : x;
  }
}

// a in the lanes where x < 0, b in the others.
template <class V>
KSAM_INLINE V where_negative(const V& x, const V& a, const V& b) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {where_negative(x.low, a.low, b.low), where_negative(x.high, a.high, b.high)};
  } else {
    return x < 0 ? a : b;
  }
}

// a in the lanes where x == 0, b in the others.
template <class V>
KSAM_INLINE V where_zero(const V& x, const V& a, const V& b) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {where_zero(x.low, a.low, b.low), where_zero(x.high, a.high, b.high)};
  } else {
    return x == 0 ? a : b;
  }
}

// a * b + c in a register of floats, rounded once; twice where the machine has no fused
// multiply-add. GCC makes sixteen scalar instructions of some loops that do the same.
template <class V>
KSAM_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

template <class V>
KSAM_INLINE Pair<V> fma(const Pair<V>& a, const Pair<V>& b, const Pair<V>& c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}

// What combine(a, b) makes of all lanes, for instance their sum; in the order given above.
template <class V, class Combine>
KSAM_INLINE typename LaneTraits<V>::element reduce(const V& x, const Combine& combine) {
  using A = typename LaneTraits<V>::element;
  constexpr int kCount = LaneTraits<V>::kCount;
  if constexpr (LaneTraits<V>::kIsPair) {
    return reduce(combine(x.low, x.high), combine);
  } else if constexpr (sizeof(V) > 16) {
    const auto half = bit_cast<Pair<typename LanesOf<A, kCount / 2>::type>>(x);
    return reduce(combine(half.low, half.high), combine);
  } else if constexpr (kCount == 4) {
    return combine(combine(x[0], x[2]), combine(x[1], x[3]));
  } else {
    return combine(x[0], x[1]);
  }
}

template <class V>
KSAM_INLINE typename LaneTraits<V>::element sum_of_lanes(const V& x) {
  return reduce(x, [](const auto& a, const auto& b) { return a + b; });
}

template <class V>
KSAM_INLINE typename LaneTraits<V>::element largest_lane(const V& x) {
  return reduce(x, [](const auto& a, const auto& b) { return larger(a, b); });
}

}  // namespace ksam::KSAM_ISA
