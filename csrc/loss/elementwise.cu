// Losses that are a mean over the elements of a sample: binary cross-entropy and squared error.
//
// Bytes moved: input and target once and 4 per sample; the backward pass reads both once, writes
// the gradient once, and reads 4 per sample. Launches: 1.
#include "loss/elementwise.h"
#include "loss/loss_row.h"
#include "loss/row.cuh"

namespace ksam::gpu {
namespace {

constexpr int kSampleBlocks = 2;  // how many a multiprocessor has registers for
constexpr Resident kResidentSamples{kSampleBlocks, kSampleBlocks};

// The functions that the formulas call, for numbers.
struct Math {
  template <class A>
  static __device__ __forceinline__ A number(int x) {
    return static_cast<A>(x);
  }
  template <class A>
  static __device__ __forceinline__ A exp(A x) {
    return exponential(x);
  }
  static __device__ __forceinline__ float log1p(float x) { return ::log1pf(x); }
  static __device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
  template <class A>
  static __device__ __forceinline__ A magnitude(A x) {
    return x < 0 ? -x : x;
  }
  template <class A>
  static __device__ __forceinline__ A larger(A a, A b) {
    return a > b ? a : b;
  }
  template <class A>
  static __device__ __forceinline__ A where_negative(A x, A a, A b) {
    return x < 0 ? a : b;
  }
};

// Samples with inputs of type T and targets of type Q, which is T or the arithmetic's type A.
template <class Loss, class T, class Q>
struct Samples {
  using A = Opmath<T>;
  static constexpr int N = kPerVector<T>;

  const T* input;       // [samples, n]
  const Q* target;      // [samples, n]
  const A* pos_weight;  // [n], or null
  int64_t n;

  explicit Samples(const Elementwise& args)
      : input(reinterpret_cast<const T*>(args.input.data)),
        target(reinterpret_cast<const Q*>(args.target.data)),
        pos_weight(static_cast<const A*>(args.pos_weight)),
        n(args.input.columns) {}

  struct Item {
    Packed<T, N> x;
    Packed<Q, N> t;
  };

  // body(piece, x, t, positive) for the pieces of a thread's portion of sample i, whose first
  // vector begins `lead` elements before the sample. x and t are 0 outside the piece.
  template <int kThreads, class Body>
  __device__ __forceinline__ void for_each_piece(int64_t i, int lead, const Team<kThreads>& team,
                                                 const Body& body) const {
    const T* x = input + i * n;
    const Q* t = target + i * n;
    const bool x_aligned = offset_of(x, lead) == 0, t_aligned = offset_of(t, lead) == 0;
    const bool p_aligned = offset_of(pos_weight, lead) == 0;
    for_each_batch<N, false>(
        n, lead, x_aligned && t_aligned ? 0 : -1, team,
        [&](const Piece& piece, Loads loads) {
          if (loads == Loads::aligned) {
            return Item{load_whole<N>(x + piece.first), load_whole<N>(t + piece.first)};
          }
          return Item{load_piece<N>(x, piece, x_aligned, Rounded<T>::from(0.0f)),
                      load_piece<N>(t, piece, t_aligned, Rounded<Q>::from(0.0f))};
        },
        [&](const Piece* pieces, const Item* items) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (pieces[u].end <= 0) continue;
            Elements<A, N> x, t;
#pragma unroll
            for (int j = 0; j < N; ++j) {
              x.at[j] = element(items[u].x, j);
              t.at[j] = element(items[u].t, j);
            }
            body(pieces[u], x, t, positive(pieces[u], t, p_aligned));
          }
          return true;
        });
  }

  __device__ __forceinline__ Elements<A, N> positive(const Piece& piece, const Elements<A, N>& t,
                                                     bool p_aligned) const {
    Elements<A, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] = 1;
    if constexpr (Loss::kHasWeight) {
      if (pos_weight == nullptr) return result;
      const auto p = load_piece<N>(pos_weight, piece, p_aligned, A(1));
#pragma unroll
      for (int j = 0; j < N; ++j) result.at[j] = Loss::positive(t.at[j], element(p, j));
    }
    return result;
  }
};

template <class Loss, class T, class Q>
struct SampleLosses {
  using A = Opmath<T>;
  using Sums = A;
  using Row = int64_t;
  static constexpr int N = kPerVector<T>;
  static constexpr Resident kResident = kResidentSamples;

  Samples<Loss, T, Q> samples;
  float* losses;  // [samples]

  explicit SampleLosses(const Elementwise& args) : samples(args), losses(args.losses) {}

  __device__ __forceinline__ Row row(int64_t i) const { return i; }
  __device__ __forceinline__ void settle(Row*) const {}

  template <int kThreads>
  __device__ __forceinline__ void add(const Row* i, const Team<kThreads>& team, A* sum) const {
    samples.for_each_piece(
        *i, 0, team, [&](const Piece& piece, const auto& x, const auto& t, const auto& positive) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A loss = Loss::loss(x.at[j], t.at[j], positive.at[j]);
            *sum += piece.has(j) ? loss : A(0);
          }
        });
  }

  static __device__ __forceinline__ void merge(A* sum, A other) { *sum += other; }
  static __device__ __forceinline__ void merge_lanes(int shift, A* sum) {
    *sum = sum_over_lanes(shift, *sum);
  }
  static __device__ __forceinline__ A load(const A* p) { return __ldcg(p); }

  __device__ __forceinline__ void finish(Row i, A sum) const {
    losses[i] = static_cast<float>(sum / static_cast<A>(samples.n));
  }
};

template <class Loss, class T, class Q>
struct SampleGradients {
  using A = Opmath<T>;
  static constexpr int N = kPerVector<T>;
  static constexpr int kResident = kSampleBlocks;

  Samples<Loss, T, Q> samples;
  const float* grad;    // [samples]
  int64_t grad_stride;  // between samples
  T* out;               // [samples, n]

  explicit SampleGradients(const ElementwiseGradient& args)
      : samples(args.forward),
        grad(reinterpret_cast<const float*>(args.grad.data)),
        grad_stride(args.grad.stride),
        out(reinterpret_cast<T*>(args.out)) {}

  // Writes a thread's portion of sample i. Vectors begin at boundaries of the gradient's memory.
  template <int kThreads>
  __device__ __forceinline__ void write(int64_t i, const Team<kThreads>& team) const {
    T* row = out + i * samples.n;
    const A element_grad = static_cast<A>(grad[i * grad_stride]) / static_cast<A>(samples.n);
    samples.for_each_piece(
        i, offset_of(row), team,
        [&](const Piece& piece, const auto& x, const auto& t, const auto& positive) {
          Elements<A, N> dx;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A slope = Loss::slope(x.at[j], t.at[j], positive.at[j]);
            dx.at[j] = Loss::kFactor * element_grad * slope;
          }
          store_piece<N>(row, piece, dx);
        });
  }
};

// body(Type<T>{}, Type<Q>{}) for the dtypes of input and target.
template <class Body>
void on_samples(const Elementwise& args, const Body& body) {
  on_floating(args.input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Opmath<T>;
    if constexpr (sizeof(T) != sizeof(A)) {
      if (args.target.dtype != args.input.dtype) return body(Type<T>{}, Type<A>{});
    }
    body(Type<T>{}, Type<T>{});
  });
}

RowPlan plan_of(const Elementwise& args) {
  const int vector = kVectorBytes / size_of(args.input.dtype);
  return plan_rows(args.input.rows, args.input.columns, vector, kUnroll, kResidentSamples);
}

template <class Loss>
void forward(const Elementwise& args, void* scratch, Stream stream) {
  if (args.input.rows == 0) return;
  on_samples(args, [&](auto input, auto target) {
    using T = typename decltype(input)::type;
    using Q = typename decltype(target)::type;
    launch_reduction(SampleLosses<Loss, T, Q>(args), args.input.rows, plan_of(args), NoTail{},
                     false, scratch, stream);
  });
}

template <class Loss>
void backward(const ElementwiseGradient& args, Stream stream) {
  const Matrix& input = args.forward.input;
  if (input.rows == 0) return;
  on_samples(args.forward, [&](auto input_type, auto target) {
    using T = typename decltype(input_type)::type;
    using Q = typename decltype(target)::type;
    launch_gradient(SampleGradients<Loss, T, Q>(args), input.rows, input.columns, kPerVector<T>,
                    stream);
  });
}

}  // namespace

int64_t elementwise_scratch_bytes(const Elementwise& args) {
  if (args.input.rows == 0) return 0;
  using Largest = SampleLosses<SquaredError, double, double>;
  return reduction_scratch_bytes<Largest>(args.input.rows, plan_of(args), false);
}

void binary_cross_entropy(const Elementwise& args, void* scratch, Stream stream) {
  forward<BinaryCrossEntropy<Math>>(args, scratch, stream);
}

void binary_cross_entropy_backward(const ElementwiseGradient& args, Stream stream) {
  backward<BinaryCrossEntropy<Math>>(args, stream);
}

void mse(const Elementwise& args, void* scratch, Stream stream) {
  forward<SquaredError>(args, scratch, stream);
}

void mse_backward(const ElementwiseGradient& args, Stream stream) {
  backward<SquaredError>(args, stream);
}

}  // namespace ksam::gpu
