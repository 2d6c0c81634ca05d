// What the kernels of cross-entropy have in common, in whatever layout a row's logits lie: how they
// read the target, and what they make of the row's sums.
#pragma once

#include "loss/loss_row.h"
#include "loss/target.cuh"

namespace ksam::gpu {

// For rows in planes; defined in cross_entropy_planes.cu.
void cross_entropy_in_planes(const CrossEntropy& args, Stream stream);
void cross_entropy_backward_in_planes(const CrossEntropyGradient& args, Stream stream);

// How many blocks a multiprocessor has registers for without spilling any to memory, which
// tests/cuda/resources.csv keeps watch over.
constexpr int resident_planes(Kind kind, int itemsize) {
  return itemsize == 8 || kind == Kind::probabilities ? 2 : 4;
}
constexpr Resident resident_row_losses(Kind kind, int itemsize, bool whole) {
  if (itemsize == 8 || kind == Kind::probabilities) return {2, 2};
  if (kind == Kind::classes) return {4, 4};
  return {3, whole ? 3 : 4};
}
constexpr int resident_row_gradients(Kind kind, int itemsize) {
  if (itemsize == 8 || kind == Kind::probabilities) return 2;
  return kind == Kind::classes && itemsize == 2 ? 4 : 3;
}
// Batches of logits in a span.
constexpr int batches_of_span(Kind kind, int itemsize) {
  return itemsize == 8 || kind == Kind::probabilities ? 1 : kSpan;
}

// exp(z) for z <= 0, within 2 |z| + 4 unit roundoffs: one multiplication and the GPU's power of
// two. expf takes 8 instructions; with it, kernels of 16-bit logits would wait for arithmetic
// instead of memory. An error that grows with |z| does not matter in a sum of terms exp(z) of which
// the largest is 1: it adds |z| exp(z) <= 1 / e.
__device__ __forceinline__ float quick_exponential(float z) {
#if defined(KSAM_SIMT)
  return ::expf(z);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * 1.4426950408889634f));
  return power;
#endif
}
__device__ __forceinline__ double quick_exponential(double z) { return ::exp(z); }

__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }

template <class T, class Q, Kind kKind>
struct Losses {
  using A = Opmath<T>;
  using Sums = RowSums<A>;
  using TargetOf = Target<T, Q, kKind>;

  TargetOf target;
  float* losses;  // [rows]
  A* stats;       // [rows, 3], or null

  explicit Losses(const CrossEntropy& args)
      : target(args), losses(args.losses), stats(static_cast<A*>(args.stats)) {}

  struct Row {
    int64_t i;
    bool is_settled;
    int64_t y;  // the class or kIgnored
    T x_y;      // its logit; converted where it is used, as converting waits for the load
  };

  // Loads the class and waits for it, so call it once the loads of the row's first logits have
  // begun. A load that began before them would be waited for before they begin: ptxas leaves none
  // pending across the branches that choose how logits are loaded.
  __device__ __forceinline__ void find_class(Row* row) const {
    row->y = target.class_of(target.read(row->i));
  }

  // Begins to load the class's logit, which write() waits for. Call it once the row's first logits
  // have arrived: loads that are pending together would be waited for together. x: the row's
  // logits, `step` apart.
  __device__ __forceinline__ void ask_for_logit(Row* row, const T* x, int64_t step) const {
    row->is_settled = true;
    if (TargetOf::kHasHot && row->y != kIgnored) row->x_y = x[row->y * step];
  }

  __device__ __forceinline__ void settle(Row* row, const T* x, int64_t step) const {
    if (row->is_settled) return;
    find_class(row);
    ask_for_logit(row, x, step);
  }

  static __device__ __forceinline__ void merge(Sums* sums, const Sums& other) {
    ksam::merge(sums, other);
  }

  // Writes the result of a settled row.
  __device__ __forceinline__ void write(const Row& row, const Sums& sums) const {
    RowStats<A> result{0, 0, 0};
    A loss = 0;
    if (row.y != kIgnored) {
      const A hot = target.hot(row.y);
      const A z = TargetOf::kHasHot ? to<A>(row.x_y) - sums.max : A(0);
      result = stats_of(sums, hot);
      loss = loss_of(sums, result.log_s, hot, z);
    }
    losses[row.i] = static_cast<float>(loss);
    if (stats == nullptr) return;
    A* to = stats + 3 * row.i;
    to[0] = result.max;
    to[1] = result.log_s;
    to[2] = result.mass;
  }
};

// What the gradient of a row is made of.
template <class A>
struct Slope {
  A max, log_s, mass;
  float grad;  // converted where it is used, as converting waits for the load
  A hot;

  // dx_c of a logit x; q: the target's q_c.
  __device__ __forceinline__ A at(A x, A q) const {
    return static_cast<A>(grad) * ::fma(mass, exponential(x - max - log_s), -q);
  }
};

template <class T, class Q, Kind kKind>
struct Gradients {
  using A = Opmath<T>;
  using TargetOf = Target<T, Q, kKind>;

  TargetOf target;
  const A* stats;       // [rows, 3]
  const float* grad;    // [rows]
  int64_t grad_stride;  // between rows

  explicit Gradients(const CrossEntropyGradient& args)
      : target(args.forward),
        stats(static_cast<const A*>(args.forward.stats)),
        grad(reinterpret_cast<const float*>(args.grad.data)),
        grad_stride(args.grad.stride) {}

  // The class of row i, or kIgnored, and the row's slope. All loads begin before any is waited for.
  __device__ __forceinline__ int64_t read_row(int64_t i, Slope<A>* slope) const {
    const int64_t read = target.read(i);
    *slope = {stats[3 * i], stats[3 * i + 1], stats[3 * i + 2], grad[i * grad_stride], 0};
    const int64_t y = target.class_of(read);
    if (kKind == Kind::classes) {
      slope->hot = slope->mass;  // the mass has nothing else in it
    } else if (y != kIgnored) {
      slope->hot = target.hot(y);
    }
    return y;
  }
};

}  // namespace ksam::gpu
