// exp, log1p and log of sixteen lanes. For float32 these are polynomials, minimax in the relative
// error; for float64 the C library is called lane by lane.
#pragma once

#include "common/lanes.h"

namespace ksam::KSAM_ISA {

template <class V>
using Element = typename LaneTraits<V>::element;

template <class V, class Function>
KSAM_INLINE V lane_by_lane(const V& x, const Function& function) {
  V y = x;
  for (int i = 0; i < LaneTraits<V>::kCount; ++i) y[i] = function(x[i]);
  return y;
}

// Neighbouring floats around kRound are 1 apart. So x + kRound rounds x to an integer, and has that
// integer as its low bits. Shifted to the exponent's place, these make the integer's power of two.
constexpr float kRound = 0x1.8p23f;
constexpr float kLog2E = 0x1.715476p0f;

// exp(x) for x <= 0, within 2 |x| u + 2 ulp (u: the unit roundoff); 0 below -87, where float32's
// normal numbers end. For terms of a sum whose largest is exp(0) = 1. Computed as 2^n 2^f, n being
// the integer nearest to x log2(e).
template <class V>
KSAM_INLINE V exp_term(const V& x) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {exp_term(x.low), exp_term(x.high)};
  } else if constexpr (sizeof(Element<V>) == 8) {
    return lane_by_lane(x, [](double lane) { return __builtin_exp(lane); });
  } else {
    using u32 = typename LikeOf<V>::u32;
    const V y = x * kLog2E;
    const V biased = y + (kRound + 127);  // its low bits are the exponent of 2^n as floats have it
    const V f = y - (biased - (kRound + 127));  // [-0.5, 0.5], exactly
    V p = fma(broadcast<V>(0.0013264727f), f, broadcast<V>(0.009671513f));
    p = fma(p, f, broadcast<V>(0.055507336f));
    p = fma(p, f, broadcast<V>(0.24022242f));
    p = fma(p, f, broadcast<V>(0.693147f));
    p = fma(p, f, broadcast<V>(1.0f));
    // A product keeps NaN; adding the exponents as integers would turn its bits into some number.
    const V e = p * bit_cast<V>(bit_cast<u32>(biased) << 23);
    return x < -87.0f ? V{} : e;
  }
}

// exp(x) for x <= 0 within 2 ulp, denormal results included. Computed as 2^n exp(r) with
// r = x - n log 2, where n times the leading bits of log 2 is exact; 2^n, which may be denormal, is
// the product of two factors.
template <class V>
KSAM_INLINE V exp_accurate(const V& x) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {exp_accurate(x.low), exp_accurate(x.high)};
  } else if constexpr (sizeof(Element<V>) == 8) {
    return lane_by_lane(x, [](double lane) { return __builtin_exp(lane); });
  } else {
    using i32 = typename LikeOf<V>::i32;
    using u32 = typename LikeOf<V>::u32;  // may wrap around, in lanes that are dropped
    const V rounded = x * kLog2E + kRound;
    const V n = rounded - kRound;
    V r = fma(n, broadcast<V>(-0x1.63p-1f), x);
    r = fma(n, broadcast<V>(0x1.bd0106p-13f), r);
    V p = fma(broadcast<V>(0.0013843644f), r, broadcast<V>(0.008374163f));
    p = fma(p, r, broadcast<V>(0.041668f));
    p = fma(p, r, broadcast<V>(0.16666432f));
    p = fma(p, r, broadcast<V>(0.49999994f));
    p = fma(p * r, r, r) + 1.0f;
    const u32 power = bit_cast<u32>(rounded) - bit_cast<u32>(broadcast<V>(kRound));
    const u32 half = bit_cast<u32>(bit_cast<i32>(power) >> 1);
    const V e = p * bit_cast<V>((half + 127) << 23) * bit_cast<V>((power - half + 127) << 23);
    return x < -105.0f ? V{} : e;  // less than half of the smallest denormal number
  }
}

// 2 atanh(x / (2 + x)) = log(1 + x) for x in [-0.3, 1], within 3 ulp.
template <class V>
KSAM_INLINE V log1p_near_0(V x) {
  const V s = x / (x + 2.0f);
  const V square = s * s;
  V p = fma(broadcast<V>(0.28012666f), square, broadcast<V>(0.28001678f));
  p = fma(p, square, broadcast<V>(0.40021533f));
  p = fma(p, square, broadcast<V>(0.6666642f));
  return fma(p * square, s, s + s);
}

// log(1 + x) for x in [0, 1], within 3 ulp.
template <class V>
KSAM_INLINE V log1p(const V& x) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {log1p(x.low), log1p(x.high)};
  } else if constexpr (sizeof(Element<V>) == 8) {
    return lane_by_lane(x, [](double lane) { return __builtin_log1p(lane); });
  } else {
    return log1p_near_0(x);
  }
}

// log(x) for normal numbers x within 4 ulp; NaN for NaN. Computed as n log 2 + log(y) with x = 2^n
// y and y in [1 / sqrt 2, sqrt 2).
template <class V>
KSAM_INLINE V log(const V& x) {
  if constexpr (LaneTraits<V>::kIsPair) {
    return {log(x.low), log(x.high)};
  } else if constexpr (sizeof(Element<V>) == 8) {
    return lane_by_lane(x, [](double lane) { return __builtin_log(lane); });
  } else {
    using i32 = typename LikeOf<V>::i32;
    constexpr int kRootHalf = 0x3f3504f3;
    const i32 above = bit_cast<i32>(x) - kRootHalf;
    const i32 n = above >> 23;
    const V y = bit_cast<V>(above - (n << 23) + kRootHalf);
    const V power = __builtin_convertvector(n, V);
    const V low = fma(power, broadcast<V>(-0x1.bd0106p-13f), log1p_near_0(y - 1.0f));
    return x == x ? fma(power, broadcast<V>(0x1.63p-1f), low) : x;
  }
}

}  // namespace ksam::KSAM_ISA
