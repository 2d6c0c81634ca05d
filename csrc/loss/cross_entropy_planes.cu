// Cross-entropy of rows that lie side by side, as pixels of [B, C, H, W] do, and its gradient. Each
// thread has a row, so that a warp reads a class's logits of 32 neighbouring rows at once. Where
// there are too few rows to keep the device busy, several threads share a row's classes.
//
// Bytes moved: as for rows with their classes side by side (cross_entropy.cu and
// cross_entropy_backward.cu), which have the same formulas. Launches: 1 each.
#include "loss/cross_entropy.cuh"

namespace ksam::gpu {
namespace {

// Classes whose logits a thread loads before it uses the first.
constexpr int kClasses = gpu_or_simt(8, 4);

// A row has at most this many parts in the forward pass, where its block adds them up: they go to
// threads of different warps, so that the threads of a warp have neighbouring rows.
constexpr int kMaxParts = kRowThreads / kWarp;

// Rows of type T that lie in planes.
template <class T>
struct Planes {
  T* data;
  int64_t group, group_stride, stride;

  explicit Planes(const Matrix& m)
      : data(reinterpret_cast<T*>(m.data)),
        group(m.group),
        group_stride(m.group_stride),
        stride(m.plane_stride) {}

  // Class 0 of a row.
  __device__ __forceinline__ T* row(int64_t i) const {
    return data + i / group * group_stride + i % group;
  }
};

// kClasses logits of a row from class `first` on, and its probabilities if the target has them.
// Past the last class these are `none` and 0.
template <class T, class Q, Kind kKind>
struct Batch {
  T x[kClasses];
  Q t[kClasses];

  __device__ __forceinline__ Batch(const T* x_, int64_t x_step, const Q* t_, int64_t t_step,
                                   int64_t first, int64_t classes, T none) {
    const bool whole = first + kClasses <= classes;
#pragma unroll
    for (int u = 0; u < kClasses; ++u) {
      const bool is_there = whole || first + u < classes;
      x[u] = is_there ? x_[(first + u) * x_step] : none;
      if constexpr (kKind == Kind::probabilities) {
        t[u] = is_there ? t_[(first + u) * t_step] : Rounded<Q>::from(0.0f);
      }
    }
  }

  template <class A>
  __device__ __forceinline__ A probability(int u) const {
    if constexpr (kKind == Kind::probabilities) return to<A>(t[u]);
    return 0;
  }
};

template <class T, class Q, Kind kKind>
struct PlaneLosses : Losses<T, Q, kKind> {
  using Base = Losses<T, Q, kKind>;
  using Base::target;
  using typename Base::A;
  using typename Base::Sums;
  using typename Base::TargetOf;
  static constexpr int kResident = resident_planes(kKind, sizeof(T));

  Planes<const T> logits;
  Planes<const Q> probabilities;  // unused where the target is classes

  explicit PlaneLosses(const CrossEntropy& args)
      : Base(args), logits(args.logits), probabilities(args.target) {}

  // Adds up the classes of a row that belong to the thread's part.
  __device__ __forceinline__ void add(typename Base::Row* row, const T* x, const Team<1>& team,
                                      Sums* sums) const {
    const Q* t = TargetOf::kHasHot ? nullptr : probabilities.row(row->i);
    const T none = Rounded<T>::from(-HUGE_VALF);  // adds exp(-inf)
    for (int64_t first = team.place() * kClasses; first < target.classes;
         first += team.places() * kClasses) {
      const Batch<T, Q, kKind> batch(x, logits.stride, t, probabilities.stride, first,
                                     target.classes, none);
      if (!row->is_settled) Base::find_class(row);
      if (row->y == kIgnored) return;
      A high = to<A>(batch.x[0]);
#pragma unroll
      for (int u = 1; u < kClasses; ++u) high = larger(high, to<A>(batch.x[u]));
      if (high > sums->max) raise_maximum(sums, high);
      if (!row->is_settled) Base::ask_for_logit(row, x, logits.stride);
      const A max = origin(sums->max);
#pragma unroll
      for (int u = 0; u < kClasses; ++u) {
        const A z = to<A>(batch.x[u]) - max;
        sums->exp += quick_exponential(z);
        if constexpr (TargetOf::kHasSpread) {
          if (first + u >= target.classes) continue;
          const A q = target.spread_of(first + u, batch.template probability<A>(u));
          sums->mass += q;
          sums->dot = ::fma(q, z, sums->dot);
        }
      }
    }
  }
};

// 2^shift threads of a block share a row; the threads of a warp have 32 different rows.
template <class L>
__global__ void __launch_bounds__(kRowThreads, L::kResident)
    plane_losses_kernel(KSAM_PARAMETER(L) losses, int64_t rows, int shift) {
  __shared__ typename L::Sums of_thread[kRowThreads];
  const int per_block = kRowThreads >> shift;
  const Team<1> team{0, 1, static_cast<int>(threadIdx.x) / per_block, 1 << shift};
  const int lane = static_cast<int>(threadIdx.x) % per_block;
  for (int64_t base = int64_t{blockIdx.x} * per_block; base < rows;
       base += int64_t{gridDim.x} * per_block) {
    const int64_t i = base + lane;
    typename L::Sums sums{};
    typename L::Base::Row row{};
    const auto* x = losses.logits.row(i < rows ? i : 0);
    if (i < rows) {
      row.i = i;
      losses.add(&row, x, team, &sums);
    }
    if (shift > 0) {
      of_thread[threadIdx.x] = sums;  // a block has one turn: log2_parts()
      __syncthreads();
      if (team.part > 0) return;
      for (int part = 1; part < team.parts; ++part) {
        L::merge(&sums, of_thread[part * per_block + lane]);
      }
    }
    if (i < rows) {
      losses.settle(&row, x, losses.logits.stride);
      losses.write(row, sums);
    }
  }
}

template <class T, class Q, Kind kKind>
struct PlaneGradients : Gradients<T, Q, kKind> {
  using Base = Gradients<T, Q, kKind>;
  using Base::target;
  using typename Base::A;
  using typename Base::TargetOf;
  static constexpr int kResident = resident_planes(kKind, sizeof(T));

  Planes<const T> logits;
  Planes<const Q> probabilities;  // unused where the target is classes
  Planes<T> out;

  explicit PlaneGradients(const CrossEntropyGradient& args)
      : Base(args),
        logits(args.forward.logits),
        probabilities(args.forward.target),
        out(args.out) {}

  // Writes the classes of a row that belong to the thread's part.
  template <int kThreads>
  __device__ __forceinline__ void write(int64_t i, const Team<kThreads>& team) const {
    T* to_ = out.row(i);
    Slope<A> slope;
    const int64_t y = Base::read_row(i, &slope);
    if (y == kIgnored) return clear(to_, team);
    const T* x = logits.row(i);
    const Q* t = TargetOf::kHasHot ? nullptr : probabilities.row(i);
    const T none = Rounded<T>::from(0.0f);
    for (int64_t first = team.place() * kClasses; first < target.classes;
         first += team.places() * kClasses) {
      const Batch<T, Q, kKind> batch(x, logits.stride, t, probabilities.stride, first,
                                     target.classes, none);
#pragma unroll
      for (int u = 0; u < kClasses; ++u) {
        const int64_t c = first + u;
        if (c >= target.classes) break;
        A q = 0;
        if constexpr (TargetOf::kHasSpread) {
          q = target.spread_of(c, batch.template probability<A>(u));
        }
        if (TargetOf::kHasHot && c == y) q += slope.hot;
        to_[c * out.stride] = Rounded<T>::from(slope.at(to<A>(batch.x[u]), q));
      }
    }
  }

  template <int kThreads>
  __device__ __forceinline__ void clear(T* to_, const Team<kThreads>& team) const {
    const T zero = Rounded<T>::from(0.0f);
    for (int64_t c = team.place(); c < target.classes; c += team.places()) {
      to_[c * out.stride] = zero;
    }
  }
};

// Log2 of how many threads share a row: as many as the device runs at once for all rows, if each
// gets a whole batch of classes. The order in which a row is added up depends on it.
int log2_parts(const CrossEntropy& args, int resident, int max_parts) {
  const int64_t capacity = int64_t{resident} * multiprocessors() * kRowThreads;
  const int64_t batches = (args.logits.columns + kClasses - 1) / kClasses;
  int shift = 0;
  while (2 << shift <= max_parts && 2 << shift <= batches &&
         args.logits.rows << (shift + 1) <= capacity) {
    ++shift;
  }
  return shift;
}

}  // namespace

void cross_entropy_in_planes(const CrossEntropy& args, Stream stream) {
  on_target(args, [&](auto type) {
    using Types = decltype(type);
    using Loss = PlaneLosses<typename Types::Logit, typename Types::Probability, Types::kind>;
    constexpr int kResident = Loss::kResident;
    const int shift = log2_parts(args, kResident, kMaxParts);
    const int per_block = kRowThreads >> shift;
    const int64_t needed = (args.logits.rows + per_block - 1) / per_block;
    launch(plane_losses_kernel<Loss>, dim3(row_blocks(needed, kResident)), kRowThreads, stream,
           Loss(args), args.logits.rows, shift);
  });
}

void cross_entropy_backward_in_planes(const CrossEntropyGradient& args, Stream stream) {
  on_target(args.forward, [&](auto type) {
    using Types = decltype(type);
    using Gradient =
        PlaneGradients<typename Types::Logit, typename Types::Probability, Types::kind>;
    const int64_t rows = args.forward.logits.rows;
    const unsigned parts = 1u << log2_parts(args.forward, Gradient::kResident, 64);
    const int64_t needed = (rows + kRowThreads - 1) / kRowThreads;
    launch(gradient_kernel<Gradient>, dim3(row_blocks(needed, Gradient::kResident), parts),
           kRowThreads, stream, Gradient(args), rows, 0);
  });
}

}  // namespace ksam::gpu
