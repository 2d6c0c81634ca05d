// Losses that are a mean over the elements of a sample, shared by host and device. x, t and p
// are elements of the input, of the target and of pos_weight: a number on the GPU, a vector of
// lanes on the CPU. Math has the functions for either.
#pragma once

#include "common/host_device.h"

namespace ksam {

// (1 - t) x + positive softplus(-x), softplus(-x) = log1p(exp(-|x|)) + max(-x, 0).
template <class Math>
struct BinaryCrossEntropy {
  static constexpr bool kHasWeight = true;
  static constexpr int kFactor = 1;

  // 1 + (p - 1) t; 1 without pos_weight.
  template <class V>
  static KSAM_FORMULA V positive(const V& t, const V& p) {
    const V one = Math::template number<V>(1);
    return one + (p - one) * t;
  }

  template <class V>
  static KSAM_FORMULA V loss(const V& x, const V& t, const V& positive) {
    const V zero{};
    const V softplus =
        Math::log1p(Math::exp(zero - Math::magnitude(x))) + Math::larger(zero - x, zero);
    return (Math::template number<V>(1) - t) * x + positive * softplus;
  }

  // (1 - t) - positive sigmoid(-x), where sigmoid(-x) is 1 / (1 + e) for e = exp(-|x|) and x < 0,
  // and e / (1 + e) otherwise.
  template <class V>
  static KSAM_FORMULA V slope(const V& x, const V& t, const V& positive) {
    const V one = Math::template number<V>(1);
    const V e = Math::exp(V{} - Math::magnitude(x));
    const V sigmoid = Math::where_negative(x, one, e) / (one + e);
    return (one - t) - positive * sigmoid;
  }
};

// (x - t)^2
struct SquaredError {
  static constexpr bool kHasWeight = false;
  // A factor of the slope. It multiplies g / n first, as 2 (x - t) may overflow where the gradient
  // does not.
  static constexpr int kFactor = 2;

  template <class V>
  static KSAM_FORMULA V loss(const V& x, const V& t, const V&) {
    return (x - t) * (x - t);
  }

  template <class V>
  static KSAM_FORMULA V slope(const V& x, const V& t, const V&) {
    return x - t;
  }
};

}  // namespace ksam
