// Gradient of cross-entropy: dx_c = g (mass p_c - q_c) with p_c = exp(x_c - m - log s), from the
// statistics (m, log s, mass) of the forward pass; 0 in ignored rows.
//
// Bytes moved: each logit once, each element of the gradient once, and each probability where the
// target has them; per row a class, 4 for g and 12 for the statistics (float64: 24). Launches: 1.
#include "loss/cross_entropy.cuh"

namespace ksam::gpu {
namespace {

template <class T, class Q, Kind kKind>
struct RowGradients : Gradients<T, Q, kKind> {
  using Base = Gradients<T, Q, kKind>;
  using Base::target;
  using typename Base::A;
  using typename Base::TargetOf;
  static constexpr int N = kPerVector<T>;
  static constexpr int kResident = resident_row_gradients(kKind, sizeof(T));

  const T* logits;  // [rows, classes]
  int64_t stride;   // between rows
  T* out;           // [rows, classes], contiguous

  explicit RowGradients(const CrossEntropyGradient& args)
      : Base(args),
        logits(reinterpret_cast<const T*>(args.forward.logits.data)),
        stride(args.forward.logits.stride),
        out(reinterpret_cast<T*>(args.out.data)) {}

  struct Item {
    Packed<T, N> x;
    typename TargetOf::Probabilities t;
  };

  // Writes a thread's portion of a row. Vectors begin at the boundaries of the gradient's memory.
  template <int kThreads>
  __device__ __forceinline__ void write(int64_t i, const Team<kThreads>& team) const {
    T* to = out + i * target.classes;
    const int lead = offset_of(to);
    Slope<A> slope;
    const int64_t y = Base::read_row(i, &slope);
    if (y == kIgnored) return clear(to, lead, team);
    const T* x = logits + i * stride;
    const Q* t = target.row(TargetOf::kHasHot ? 0 : i);
    const int offset = offset_of(x, lead);
    const bool t_aligned = TargetOf::kHasHot || offset_of(t, lead) == 0;
    const bool w_aligned = offset_of(target.weight, lead) == 0;
    const T zero = Rounded<T>::from(0.0f);
    for_each_batch<N, TargetOf::kMayShift>(
        target.classes, lead, t_aligned ? offset : -1, team,
        [&](const Piece& piece, Loads loads) {
          return Item{TargetOf::load_logits(x, piece, loads, offset, zero),
                      target.load(t, piece, loads, t_aligned)};
        },
        [&](const Piece* pieces, const Item* items) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (pieces[u].end > 0) {
              store_piece<N>(to, pieces[u], gradient(slope, pieces[u], items[u], y, w_aligned));
            }
          }
          return true;
        });
  }

  __device__ __forceinline__ Elements<A, N> gradient(const Slope<A>& slope, const Piece& piece,
                                                     const Item& item, int64_t y,
                                                     bool w_aligned) const {
    Elements<A, N> q{};
    if constexpr (TargetOf::kHasSpread) q = target.spread(item.t, piece, w_aligned);
    const int64_t ahead = y - piece.first;
    const int hot_at = TargetOf::kHasHot && ahead >= 0 && ahead < N ? static_cast<int>(ahead) : -1;
    Elements<A, N> dx;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A of_class = j == hot_at ? q.at[j] + slope.hot : q.at[j];
      dx.at[j] = slope.at(element(item.x, j), of_class);
    }
    return dx;
  }

  template <int kThreads>
  __device__ __forceinline__ void clear(T* to, int lead, const Team<kThreads>& team) const {
    struct Nothing {};
    const Elements<A, N> zeros{};
    for_each_batch<N, false>(
        target.classes, lead, 0, team, [](const Piece&, Loads) { return Nothing{}; },
        [&](const Piece* pieces, const Nothing*) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (pieces[u].end > 0) store_piece<N>(to, pieces[u], zeros);
          }
          return true;
        });
  }
};

}  // namespace

void cross_entropy_backward(const CrossEntropyGradient& args, Stream stream) {
  if (args.forward.logits.rows == 0) return;
  if (args.forward.logits.in_planes()) return cross_entropy_backward_in_planes(args, stream);
  on_target(args.forward, [&](auto type) {
    using Types = decltype(type);
    using Gradient = RowGradients<typename Types::Logit, typename Types::Probability, Types::kind>;
    launch_gradient(Gradient(args), args.forward.logits.rows, args.forward.logits.columns,
                    Gradient::N, stream);
  });
}

}  // namespace ksam::gpu
