// The arithmetic on one element, in the order in which it is rounded. Shared by host and device.
//
// S is float or double, and V is S or a SIMD vector of S. No product may be contracted with a sum:
// the contract is the bits that ksam_kernels/perturb/reference.py computes.
#pragma once

#include "common/host_device.h"
#include "perturb/perturb.h"

namespace ksam {

// Whether weights move at this norm. They do not if it rounds to 0 or to infinity in float32:
// callers are shown that 0 or infinity, and must then find the weights unmoved.
KSAM_FORMULA bool moves_at(double norm) {
  const float shown = static_cast<float>(norm);
  return shown > 0 && shown - shown == 0;
}

// What the gradient is divided by: at least the smallest normal float, so that a denormal norm
// moves no weight by more than rho.
KSAM_FORMULA double divisor_of(double norm) { return norm < 0x1p-126 ? 0x1p-126 : norm; }

// w + rho * g / n
template <class V, class S>
KSAM_FORMULA V climbed(V w, V g, S n, S rho) {
  return w + rho * (g / n);
}

// w + rho * T^2 g / n with T = |w| + eta; n = ||T g||
template <class V, class S>
KSAM_FORMULA V climbed_adaptive(V w, V magnitude, V g, S n, S rho, S eta) {
  const V t = magnitude + eta;
  return w + rho * (t * (t * g / n));
}

KSAM_FORMULA double value_of(const Rate& rate) {
  return rate.stored == nullptr ? rate.number : double{*rate.stored};
}

// The gradient as an update takes it: unscaled, turned uphill if maximized, with L2 weight decay.
template <class S>
struct Direction {
  S grad_scale, weight_decay;
  bool scaled, maximize;

  KSAM_FORMULA bool decays() const { return weight_decay != 0; }

  // The caller passes decays(): the CPU calls it once before a loop; a GPU, for every element, as
  // keeping one more value would make registers spill.
  template <class V>
  KSAM_FORMULA V operator()(V g, V w, bool decays) const {
    V d = scaled ? g / grad_scale : g;
    d = maximize ? -d : d;
    return decays ? d + weight_decay * w : d;
  }
};

template <class S>
KSAM_FORMULA Direction<S> direction_of(const Scaling& scaling, double weight_decay, bool maximize) {
  const bool scaled = scaling.grad_scale != nullptr;
  const S scale = scaled ? static_cast<S>(*scaling.grad_scale) : 1;
  return {scale, static_cast<S>(weight_decay), scaled, maximize};
}

template <class S>
struct Sgd {
  S lr, momentum, gain;  // gain = 1 - dampening
  bool nesterov, first;  // first: there is no momentum yet

  template <class V>
  KSAM_FORMULA V new_momentum(V v, V d) const {
    return first ? d : momentum * v + gain * d;
  }

  template <class V>
  KSAM_FORMULA V updated(V w, V v, V d) const {
    return w - lr * (nesterov ? d + momentum * v : v);
  }
};

template <class S>
KSAM_FORMULA Sgd<S> sgd_of(const SgdArgs& args, bool first) {
  return {static_cast<S>(value_of(args.lr)), static_cast<S>(args.momentum),
          static_cast<S>(1 - args.dampening), args.nesterov, first};
}

template <class S>
struct Adam {
  S beta1, mean_gain, beta2, square_gain;  // gains: 1 - beta
  S eps, decay;                            // decay: 1 - lr * decoupled weight decay, or 1
  S step_size, root_correction;            // lr / (1 - beta1^t), sqrt(1 - beta2^t)
  bool from_old;                           // beta1 > 0.5

  // m + (1 - beta1) * (g - m), from the nearer end as torch.lerp does.
  template <class V>
  KSAM_FORMULA V new_mean(V m, V g) const {
    return (from_old ? m : g) + (from_old ? mean_gain : -beta1) * (g - m);
  }

  template <class V>
  KSAM_FORMULA V new_square(V v, V g) const {
    return beta2 * v + square_gain * g * g;
  }

  template <class V>
  KSAM_FORMULA V updated(V w, V m, V root_v) const {
    return w * decay - (step_size * m) / (root_v / root_correction + eps);
  }
};

// The weight decay that is added to the gradient: Adam's. AdamW's multiplies the weights.
KSAM_FORMULA double l2_of(const AdamArgs& args) {
  return args.decoupled_weight_decay ? 0 : args.weight_decay;
}

template <class S>
KSAM_FORMULA Adam<S> adam_of(const AdamArgs& args, const BiasCorrection& correction) {
  const double decay = args.decoupled_weight_decay ? 1 - value_of(args.lr) * args.weight_decay : 1;
  return {static_cast<S>(args.beta1),
          static_cast<S>(1 - args.beta1),
          static_cast<S>(args.beta2),
          static_cast<S>(1 - args.beta2),
          static_cast<S>(args.eps),
          static_cast<S>(decay),
          static_cast<S>(correction.step_size),
          static_cast<S>(correction.root_correction),
          args.beta1 > 0.5};
}

}  // namespace ksam
