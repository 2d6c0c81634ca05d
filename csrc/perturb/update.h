// What becomes of an element, in the order in which it is rounded; shared by host and device.
//
// V is float, double or a vector of them, S the scalar. No product may be contracted with a sum:
// the contract is the bits that ksam_kernels/perturb/reference.py computes.
#pragma once

#if defined(__CUDACC__)
#define KSAM_HOST_DEVICE __host__ __device__
#else
#define KSAM_HOST_DEVICE
#endif

namespace ksam {

// w + rho * g / n
template <class V, class S>
KSAM_HOST_DEVICE inline V climb(V w, V g, S n, S rho) {
  return w + rho * (g / n);
}

// w + rho * T^2 g / n with T = |w| + eta; n = ||T g||
template <class V, class S>
KSAM_HOST_DEVICE inline V climb_adaptive(V w, V magnitude, V g, S n, S rho, S eta) {
  const V t = magnitude + eta;
  return w + rho * (t * (t * g / n));
}

template <class S>
struct Sgd {
  S lr, momentum, gain, weight_decay;  // gain = 1 - dampening
  bool nesterov;

  // d = g + weight_decay * w
  template <class V>
  KSAM_HOST_DEVICE V decayed(V g, V w) const {
    return weight_decay != 0 ? g + weight_decay * w : g;
  }

  template <class V>
  KSAM_HOST_DEVICE V new_momentum(V v, V d) const {
    return momentum * v + gain * d;
  }

  template <class V>
  KSAM_HOST_DEVICE V updated(V w, V v, V d) const {
    return w - lr * (nesterov ? d + momentum * v : v);
  }
};

template <class S>
struct Adam {
  S beta1, mean_gain, beta2, square_gain, eps;  // gains: 1 - beta
  S weight_decay;                               // decoupled: 1 - lr * weight_decay
  bool decays, decoupled;
  bool from_old;  // beta1 > 0.5

  template <class V>
  KSAM_HOST_DEVICE void decay(V& w, V& g) const {
    if (!decays) return;
    if (decoupled) {
      w = w * weight_decay;
    } else {
      g = g + weight_decay * w;
    }
  }

  // m + (1 - beta1) * (g - m), from the nearer end as torch.lerp does.
  template <class V>
  KSAM_HOST_DEVICE V new_mean(V m, V g) const {
    return from_old ? m + mean_gain * (g - m) : g - beta1 * (g - m);
  }

  template <class V>
  KSAM_HOST_DEVICE V new_square(V v, V g) const {
    return beta2 * v + square_gain * g * g;
  }

  template <class V>
  KSAM_HOST_DEVICE V updated(V w, V m, V root_v, S step_size, S root_correction) const {
    return w - (step_size * m) / (root_v / root_correction + eps);
  }
};

}  // namespace ksam
