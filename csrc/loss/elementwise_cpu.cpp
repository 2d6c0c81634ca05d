// Losses that are a mean over the elements of a sample: binary cross-entropy and squared error.
//
// Bytes moved: input and target once and 4 per sample; the backward pass reads both once, writes
// the gradient once, and reads 4 per sample.
#include "loss/elementary_cpu.h"
#include "loss/elementwise.h"
#include "loss/rows_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Samples of fewer elements are narrow rows, which do not fill a vector.
constexpr int64_t kNarrow = kLanes;

// The functions that the formulas call, for vectors of lanes.
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

// The formulas of a loss, with pos_weight or without.
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

// Sum of the losses of one row of at least kLanes elements.
template <class Loss, class T, class A = Opmath<T>>
KSAM_INLINE double wide_row(const Elementwise& args, int64_t row, A* buffer) {
  using V = Lanes<T>;
  const T* input = row_of<T>(args.input, row);
  const A* weight = static_cast<const A*>(args.pos_weight);
  double sum = 0;  // a row may have millions of elements: a float would lose digits over its blocks
  for_each_block(args.input.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const A* target = staged(args.target, row, begin, n, buffer);
    V block{};
    for_each_sum<V>(n, [&](int64_t i, const auto& fresh) KSAM_INLINE_LAMBDA {
      const V x = load_lanes<V>(input + begin + i);
      const V t = load_lanes<V>(target + i);
      block = block + fresh(Loss::loss(x, t, weight_at<Loss, V>(weight, begin + i)));
    });
    sum += sum_of_lanes(block);
  });
  return sum;
}

template <class Loss, class T>
void forward_wide(const Elementwise& args, int64_t begin, int64_t end) {
  using A = Opmath<T>;
  alignas(64) A buffer[kBlockCapacity];
  for (int64_t row = begin; row < end; ++row) {
    const double sum = wide_row<Loss, T>(args, row, buffer);
    args.losses[row] = static_cast<float>(sum / static_cast<double>(args.input.columns));
  }
}

// body(row, count) for blocks of whole rows of n < kNarrow elements, fewer than kBlockCapacity
// elements a block. Every block fills a vector, unless all rows together do not.
template <class Body>
KSAM_INLINE void for_each_rows(int64_t begin, int64_t end, int64_t n, const Body& body) {
  for (int64_t row = begin; row < end;) {
    const int64_t count = (end - row) * n < kBlockCapacity ? end - row : kBlock / n;
    body(row, count);
    row += count;
  }
}

// The n elements; if they do not fill a vector, copied to `buffer` [kLanes] and followed by zeros.
// They may be in the buffer already.
template <class T>
KSAM_INLINE const T* padded(const T* from, int64_t n, T* buffer) {
  if (n >= kLanes) return from;
  T all[kLanes] = {};
  std::memcpy(all, from, n * sizeof(T));
  std::memcpy(buffer, all, sizeof(all));
  return buffer;
}

// The elements of a block of narrow rows, which lie one after the other. A vector takes elements of
// several rows.
template <class Loss, class T>
class NarrowRows {
  using A = Opmath<T>;
  using V = Lanes<T>;

 public:
  NarrowRows(const Elementwise& args, int64_t rows) : args_(args) {
    if constexpr (Loss::kReadsWeight) {
      const int64_t n = args.input.columns;  // the weights of a row, repeated for each row
      const int64_t most = rows * n < kBlockCapacity ? rows * n : kBlockCapacity;
      for (int64_t i = 0; i < most; i += n) {
        std::memcpy(weight_ + i, args.pos_weight, n * sizeof(A));
      }
      padded(weight_, most, weight_);
    }
  }

  // A block of for_each_rows().
  KSAM_INLINE void read(int64_t row, int64_t rows) {
    count_ = rows * args_.input.columns;
    x_ = padded(row_of<T>(args_.input, row), count_, few_);
    t_ = padded(staged(args_.target, row, 0, count_, buffer_), count_, buffer_);
  }

  // body(i, x, t, p) for vectors that cover all elements, followed by zeros if fewer than kLanes.
  template <class Body>
  KSAM_INLINE void for_each(const Body& body) const {
    for_each_vector(count_ < kLanes ? kLanes : count_, [&](int64_t i) KSAM_INLINE_LAMBDA {
      body(i, load_lanes<V>(x_ + i), load_lanes<V>(t_ + i), weight_at<Loss, V>(weight_, i));
    });
  }

 private:
  const Elementwise& args_;
  int64_t count_ = 0;
  const T* x_ = nullptr;
  const A* t_ = nullptr;
  T few_[kLanes];
  alignas(64) A buffer_[kBlockCapacity];
  A weight_[Loss::kReadsWeight ? kBlockCapacity + kNarrow : 1];
};

// losses [rows] <- means of n terms each, which are added up one after the other.
template <class A>
KSAM_INLINE void write_means(const A* terms, int64_t rows, int64_t n, float* losses) {
  if (n == 1) {  // the compiler vectorizes a loop that has no other loop in it
    for (int64_t i = 0; i < rows; ++i) losses[i] = static_cast<float>(A{} + terms[i]);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    A sum = 0;
    for (int64_t c = 0; c < n; ++c) sum += terms[i * n + c];
    losses[i] = static_cast<float>(sum / static_cast<A>(n));
  }
}

template <class Loss, class T>
void forward_narrow(const Elementwise& args, int64_t begin, int64_t end) {
  using A = Opmath<T>;
  using V = Lanes<T>;
  const int64_t n = args.input.columns;
  alignas(64) A terms[kBlockCapacity];
  NarrowRows<Loss, T> rows(args, end - begin);
  for_each_rows(begin, end, n, [&](int64_t row, int64_t count) KSAM_INLINE_LAMBDA {
    rows.read(row, count);
    rows.for_each([&](int64_t i, const V& x, const V& t, const V& p)
                      KSAM_INLINE_LAMBDA { store_lanes(terms + i, Loss::loss(x, t, p)); });
    write_means(terms, count, n, args.losses + row);
  });
}

// The gradient of each element's loss in a row: g / n.
template <class A>
KSAM_INLINE A element_grad_of(const ElementwiseGradient& args, int64_t row) {
  return static_cast<A>(*row_of<float>(args.grad, row)) /
         static_cast<A>(args.forward.input.columns);
}

template <class Loss, class T, class A = Opmath<T>>
KSAM_INLINE void wide_row_backward(const ElementwiseGradient& args, int64_t row, A* buffer) {
  using V = Lanes<T>;
  const Elementwise& forward = args.forward;
  const T* input = row_of<T>(forward.input, row);
  const A* weight = static_cast<const A*>(forward.pos_weight);
  T* out = reinterpret_cast<T*>(args.out) + row * forward.input.columns;
  const V element_grad = all_lanes<V>(Loss::kFactor * element_grad_of<A>(args, row));
  for_each_block(forward.input.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const A* target = staged(forward.target, row, begin, n, buffer);
    for_each_vector(n, [&](int64_t i) KSAM_INLINE_LAMBDA {
      const V slope = Loss::slope(load_lanes<V>(input + begin + i), load_lanes<V>(target + i),
                                  weight_at<Loss, V>(weight, begin + i));
      store_lanes(out + begin + i, element_grad * slope);
    });
  });
}

template <class Loss, class T>
void backward_wide(const ElementwiseGradient& args, int64_t begin, int64_t end) {
  alignas(64) Opmath<T> buffer[kBlockCapacity];
  for (int64_t row = begin; row < end; ++row) wide_row_backward<Loss, T>(args, row, buffer);
}

// element_grads [rows * n] <- kFactor times a row's element_grad_of(), for each of its elements.
template <class Loss, class A>
KSAM_INLINE void expand_grads(const ElementwiseGradient& args, int64_t row, int64_t rows,
                              A* element_grads) {
  const int64_t n = args.forward.input.columns;
  const auto element_grad = [&](int64_t i) KSAM_INLINE_LAMBDA {
    return Loss::kFactor * element_grad_of<A>(args, row + i);
  };
  if (args.grad.stride == 0) {  // one for all rows, as from a mean over the batch
    const A common = element_grad(0);
    for (int64_t i = 0; i < rows * n; ++i) element_grads[i] = common;
  } else if (n == 1) {
    for (int64_t i = 0; i < rows; ++i) element_grads[i] = element_grad(i);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      const A of_row = element_grad(i);
      for (int64_t c = 0; c < n; ++c) element_grads[i * n + c] = of_row;
    }
  }
}

template <class Loss, class T>
void backward_narrow(const ElementwiseGradient& args, int64_t begin, int64_t end) {
  using A = Opmath<T>;
  using V = Lanes<T>;
  const int64_t n = args.forward.input.columns;
  alignas(64) A element_grads[kBlockCapacity] = {};
  NarrowRows<Loss, T> rows(args.forward, end - begin);
  for_each_rows(begin, end, n, [&](int64_t row, int64_t count) KSAM_INLINE_LAMBDA {
    rows.read(row, count);
    expand_grads<Loss>(args, row, count, element_grads);
    T few[kLanes];
    T* out = reinterpret_cast<T*>(args.out) + row * n;
    T* to = count * n < kLanes ? few : out;
    rows.for_each([&](int64_t i, const V& x, const V& t, const V& p) KSAM_INLINE_LAMBDA {
      store_lanes(to + i, load_lanes<V>(element_grads + i) * Loss::slope(x, t, p));
    });
    if (to != out) std::memcpy(out, few, count * n * sizeof(T));
  });
}

template <class Loss>
void forward(const Elementwise& args) {
  on_floating(args.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(args.input.rows, row_grain(args.input.columns), [&](int64_t begin, int64_t end) {
      (args.input.columns < kNarrow ? forward_narrow<Loss, T> : forward_wide<Loss, T>)(args, begin,
                                                                                       end);
    });
  });
}

template <class Loss>
void backward(const ElementwiseGradient& args) {
  const Matrix& input = args.forward.input;
  on_floating(input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(input.rows, row_grain(input.columns), [&](int64_t begin, int64_t end) {
      (input.columns < kNarrow ? backward_narrow<Loss, T> : backward_wide<Loss, T>)(args, begin,
                                                                                    end);
    });
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
