// What becomes of an element, in the order in which it is rounded; shared by host and device.
//
// S is float or double. No product may be contracted with a sum: the contract is the bits that
// ksam_kernels/perturb/reference.py computes. Choices are made by values rather than branches, so
// that loops over these formulas become vectors.
#pragma once

#include "common/host_device.h"
#include "perturb/perturb.h"

namespace ksam {

// common/isa.h says what becomes of inline functions in *_cpu.cpp files that are not static.
#define KSAM_FORMULA KSAM_HOST_DEVICE static inline

// Whether weights move at this norm. A double that rounds to 0 or to infinity moves nothing: what
// is returned says so.
KSAM_FORMULA bool moves_at(double norm) {
  const float shown = static_cast<float>(norm);
  return shown > 0 && shown - shown == 0;
}

// What the gradient is divided by: at least the smallest normal float.
KSAM_FORMULA double divisor_of(double norm) { return norm < 0x1p-126 ? 0x1p-126 : norm; }

// w + rho * g / n
template <class S>
KSAM_HOST_DEVICE inline S climbed(S w, S g, S n, S rho) {
  return w + rho * (g / n);
}

// w + rho * T^2 g / n with T = |w| + eta; n = ||T g||
template <class S>
KSAM_HOST_DEVICE inline S climbed_adaptive(S w, S magnitude, S g, S n, S rho, S eta) {
  const S t = magnitude + eta;
  return w + rho * (t * (t * g / n));
}

// The gradient as an update takes it: unscaled, turned uphill if maximized, with L2 weight decay.
template <class S>
struct Direction {
  S grad_scale, weight_decay;
  bool scaled, maximize;

  // Scale and sign in one: -(g / s) and g / -s are the same number.
  KSAM_HOST_DEVICE S divisor() const {
    const S scale = scaled ? grad_scale : 1;
    return maximize ? -scale : scale;
  }

  KSAM_HOST_DEVICE S operator()(S g, S w) const {
    S d = scaled ? g / grad_scale : g;
    d = maximize ? -d : d;
    return weight_decay != 0 ? d + weight_decay * w : d;
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
  bool nesterov, first;  // first: no momentum yet

  KSAM_HOST_DEVICE S new_momentum(S v, S d) const { return first ? d : momentum * v + gain * d; }

  KSAM_HOST_DEVICE S updated(S w, S v, S d) const {
    return w - lr * (nesterov ? d + momentum * v : v);
  }
};

template <class S>
KSAM_FORMULA Sgd<S> sgd_of(const SgdArgs& args, bool first) {
  return {static_cast<S>(args.lr), static_cast<S>(args.momentum),
          static_cast<S>(1 - args.dampening), args.nesterov, first};
}

template <class S>
struct Adam {
  S beta1, mean_gain, beta2, square_gain;  // gains: 1 - beta
  S eps, kept;                             // kept: 1 - lr * decoupled weight decay, or 1
  S step_size, root_correction;            // lr / (1 - beta1^t), sqrt(1 - beta2^t)
  bool from_old;                           // beta1 > 0.5

  // m + (1 - beta1) * (g - m), from the nearer end as torch.lerp does.
  KSAM_HOST_DEVICE S new_mean(S m, S g) const {
    return (from_old ? m : g) + (from_old ? mean_gain : -beta1) * (g - m);
  }

  KSAM_HOST_DEVICE S new_square(S v, S g) const { return beta2 * v + square_gain * g * g; }

  KSAM_HOST_DEVICE S updated(S w, S m, S root_v) const {
    return w * kept - (step_size * m) / (root_v / root_correction + eps);
  }
};

// AdamW's weight decay is part of Adam, Adam's of the gradient.
KSAM_FORMULA double l2_of(const AdamArgs& args) {
  return args.decoupled_weight_decay ? 0 : args.weight_decay;
}

template <class S>
KSAM_FORMULA Adam<S> adam_of(const AdamArgs& args, const BiasCorrection& correction) {
  const double kept = args.decoupled_weight_decay ? 1 - args.lr * args.weight_decay : 1;
  return {static_cast<S>(args.beta1),
          static_cast<S>(1 - args.beta1),
          static_cast<S>(args.beta2),
          static_cast<S>(1 - args.beta2),
          static_cast<S>(args.eps),
          static_cast<S>(kept),
          static_cast<S>(correction.step_size),
          static_cast<S>(correction.root_correction),
          args.beta1 > 0.5};
}

}  // namespace ksam
