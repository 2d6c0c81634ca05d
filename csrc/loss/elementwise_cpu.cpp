// Losses that are a mean over the elements of a sample: binary cross-entropy and squared error.
//
// Bytes moved: input and target once and 4 per sample; the backward pass reads both once, writes
// the gradient once, and reads 4 per sample.
#include "loss/elementary_cpu.h"
#include "loss/elementwise.h"
#include "loss/rows_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Samples of fewer elements are narrow rows: they do not fill a vector.
constexpr int64_t kNarrow = kLanes;

// What the formulas call, for lanes.
struct Math {
  template <class V>
  static KSAM_INLINE V number(int x) {
    return all_lanes<V>(x);
  }
  template <class V>
  static KSAM_INLINE V exp(const V& x) {
    return exp_accurate(x);
  }
  template <class V>
  static KSAM_INLINE V log1p(const V& x) {
    return KSAM_ISA::log1p(x);
  }
  template <class V>
  static KSAM_INLINE V magnitude(const V& x) {
    return KSAM_ISA::magnitude(x);
  }
  template <class V>
  static KSAM_INLINE V larger(const V& a, const V& b) {
    return KSAM_ISA::larger(a, b);
  }
  template <class V>
  static KSAM_INLINE V where_negative(const V& x, const V& a, const V& b) {
    return KSAM_ISA::where_negative(x, a, b);
  }
};

// A loss, with pos_weight or without.
template <class Formula, bool kWeighted>
struct Weighted {
  static constexpr bool kReadsWeight = kWeighted;
  static constexpr int kFactor = Formula::kFactor;

  template <class V>
  static KSAM_INLINE V positive(const V& t, const V& p) {
    if constexpr (kWeighted) {
      return Formula::positive(t, p);
    } else {
      return all_lanes<V>(1);
    }
  }
  template <class V>
  static KSAM_INLINE V loss(const V& x, const V& t, const V& p) {
    return Formula::loss(x, t, positive(t, p));
  }
  template <class V>
  static KSAM_INLINE V slope(const V& x, const V& t, const V& p) {
    return Formula::slope(x, t, positive(t, p));
  }
};

template <bool kWeighted>
using BinaryLoss = Weighted<BinaryCrossEntropy<Math>, kWeighted>;
using SquaredLoss = Weighted<SquaredError, false>;

template <class Loss, class V, class A>
KSAM_INLINE V weight_at(const A* weight, int64_t i) {
  if constexpr (Loss::kReadsWeight) {
    return load_lanes<V>(weight + i);
  } else {
    return V{};
  }
}

// The same element of sixteen narrow rows has one weight.
template <class Loss, class V, class A>
KSAM_INLINE V weight_of_all(const A* weight, int64_t c) {
  return Loss::kReadsWeight ? all_lanes<V>(weight[c]) : V{};
}

// Sum of the losses of one row of at least kLanes elements.
template <class Loss, class T, class A = opmath_t<T>>
KSAM_INLINE A wide_row(const Elementwise& args, int64_t row, A* room) {
  using V = Lanes<T>;
  const T* input = row_of<T>(args.input, row);
  const A* weight = static_cast<const A*>(args.pos_weight);
  A sum = 0;
  for_each_block(args.input.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const A* target = staged(args.target, row, begin, n, room);
    V block{};
    for_each_sum<V>(n, [&](int64_t i, const auto& kept) KSAM_INLINE_LAMBDA {
      const V x = load_lanes<V>(input + begin + i);
      const V t = load_lanes<V>(target + i);
      block = block + kept(Loss::loss(x, t, weight_at<Loss, V>(weight, begin + i)));
    });
    sum += sum_of_lanes(block);
  });
  return sum;
}

// Inputs and targets of up to sixteen rows of fewer than kNarrow elements, a lane each.
template <class T, class A>
KSAM_INLINE void fill_tiles(const Elementwise& args, int64_t begin, int64_t count, A* room,
                            Tile<T, kNarrow>* x, Tile<A, kNarrow>* t) {
  const int64_t n = args.input.columns;
  for (int64_t i = 0; i < count; ++i) {
    put_row(row_of<T>(args.input, begin + i), n, i, x);
    put_row(staged(args.target, begin + i, 0, n, room), n, i, t);
  }
}

template <class Loss, class T, class A = opmath_t<T>>
KSAM_INLINE void narrow_rows(const Elementwise& args, int64_t begin, int64_t count, A* room,
                             A* sums) {
  using V = Lanes<T>;
  Tile<T, kNarrow> x{};
  Tile<A, kNarrow> t{};
  fill_tiles(args, begin, count, room, &x, &t);
  V sum{};
  for (int64_t c = 0; c < args.input.columns; ++c) {
    sum = sum + Loss::loss(load_lanes<V>(x.at[c]), load_lanes<V>(t.at[c]),
                           weight_of_all<Loss, V>(static_cast<const A*>(args.pos_weight), c));
  }
  store_lanes(sums, sum);
}

template <class Loss, class T>
void forward_rows(const Elementwise& args, int64_t begin, int64_t end) {
  using A = opmath_t<T>;
  const int64_t n = args.input.columns;
  alignas(64) A room[kBlockRoom];
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = end - row < kLanes ? end - row : kLanes;
    A sums[kLanes];
    if (n < kNarrow) narrow_rows<Loss, T>(args, row, count, room, sums);
    for (int64_t i = 0; i < count; ++i) {
      if (n >= kNarrow) sums[i] = wide_row<Loss, T>(args, row + i, room);
      args.losses[row + i] = static_cast<float>(sums[i] / static_cast<A>(n));
    }
  }
}

// g / n of a row.
template <class A>
KSAM_INLINE A share_of(const ElementwiseGradient& args, int64_t row) {
  return static_cast<A>(*row_of<float>(args.grad, row)) /
         static_cast<A>(args.forward.input.columns);
}

template <class Loss, class T, class A = opmath_t<T>>
KSAM_INLINE void wide_row_backward(const ElementwiseGradient& args, int64_t row, A* room) {
  using V = Lanes<T>;
  const Elementwise& forward = args.forward;
  const T* input = row_of<T>(forward.input, row);
  const A* weight = static_cast<const A*>(forward.pos_weight);
  T* out = reinterpret_cast<T*>(args.out) + row * forward.input.columns;
  const V share = all_lanes<V>(Loss::kFactor * share_of<A>(args, row));
  for_each_block(forward.input.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const A* target = staged(forward.target, row, begin, n, room);
    for_each_vector(n, [&](int64_t i) KSAM_INLINE_LAMBDA {
      const V slope = Loss::slope(load_lanes<V>(input + begin + i), load_lanes<V>(target + i),
                                  weight_at<Loss, V>(weight, begin + i));
      store_lanes(out + begin + i, share * slope);
    });
  });
}

template <class Loss, class T, class A = opmath_t<T>>
KSAM_INLINE void narrow_rows_backward(const ElementwiseGradient& args, int64_t begin, int64_t count,
                                      A* room) {
  using V = Lanes<T>;
  const int64_t n = args.forward.input.columns;
  Tile<T, kNarrow> x{};
  Tile<A, kNarrow> t{};
  fill_tiles(args.forward, begin, count, room, &x, &t);
  A shares[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) shares[i] = Loss::kFactor * share_of<A>(args, begin + i);
  const V share = load_lanes<V>(shares);
  for (int64_t c = 0; c < n; ++c) {
    T* at = x.at[c];
    const V slope =
        Loss::slope(load_lanes<V>(at), load_lanes<V>(t.at[c]),
                    weight_of_all<Loss, V>(static_cast<const A*>(args.forward.pos_weight), c));
    store_lanes(at, share * slope);
  }
  for (int64_t i = 0; i < count; ++i) {
    take_row(x, n, i, reinterpret_cast<T*>(args.out) + (begin + i) * n);
  }
}

template <class Loss, class T>
void backward_rows(const ElementwiseGradient& args, int64_t begin, int64_t end) {
  alignas(64) opmath_t<T> room[kBlockRoom];
  if (args.forward.input.columns >= kNarrow) {
    for (int64_t row = begin; row < end; ++row) wide_row_backward<Loss, T>(args, row, room);
    return;
  }
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = end - row < kLanes ? end - row : kLanes;
    narrow_rows_backward<Loss, T>(args, row, count, room);
  }
}

template <class Loss>
void forward(const Elementwise& args) {
  on_floating(args.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(args.input.rows, row_grain(args.input.columns),
                 [&](int64_t begin, int64_t end) { forward_rows<Loss, T>(args, begin, end); });
  });
}

template <class Loss>
void backward(const ElementwiseGradient& args) {
  const Matrix& input = args.forward.input;
  on_floating(input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(input.rows, row_grain(input.columns),
                 [&](int64_t begin, int64_t end) { backward_rows<Loss, T>(args, begin, end); });
  });
}

}  // namespace

void binary_cross_entropy(const Elementwise& args) {
  args.pos_weight == nullptr ? forward<BinaryLoss<false>>(args) : forward<BinaryLoss<true>>(args);
}

void binary_cross_entropy_backward(const ElementwiseGradient& args) {
  args.forward.pos_weight == nullptr ? backward<BinaryLoss<false>>(args)
                                     : backward<BinaryLoss<true>>(args);
}

void mse(const Elementwise& args) { forward<SquaredLoss>(args); }
void mse_backward(const ElementwiseGradient& args) { backward<SquaredLoss>(args); }

}  // namespace ksam::KSAM_ISA
