// Cross-entropy of every row in one pass over the logits, and with it the selection of the rows of
// the largest losses. The sums are taken from the largest logit so far, which rises a few times a
// row (loss_row.h).
//
// Bytes moved: each logit once, and each probability where the target has them; per row a class,
// 4 for the loss and 12 for the statistics, if they are wanted. Selection: topk/select.cuh; the
// losses it reads lie in the cache. Launches: 1.
#include "loss/loss_row.h"
#include "loss/target.cuh"
#include "topk/select.cuh"
#include "topk/topk.h"

namespace ksam::gpu {
namespace {

// Up to here the last block selects; more losses are worth a second launch.
#if defined(KSAM_SIMT)
constexpr int64_t kSelectedByBlock = 64;
#else
constexpr int64_t kSelectedByBlock = 16384;
#endif

__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }

template <class T, class Q, Kind kKind>
struct RowLosses {
  using A = Opmath<T>;
  using Sums = RowSums<A>;
  using TargetOf = Target<T, Q, kKind>;
  static constexpr int N = kPerVector<T>;
  static constexpr int kResident = resident_blocks<T>(kKind);
  static constexpr bool kHasSpread = TargetOf::kHasSpread;

  const T* logits;  // [rows, classes]
  int64_t stride;   // between rows
  TargetOf target;
  float* losses;  // [rows]
  A* stats;       // [rows, 3], or null

  explicit RowLosses(const CrossEntropy& args)
      : logits(reinterpret_cast<const T*>(args.logits.data)),
        stride(args.logits.stride),
        target(args),
        losses(args.losses),
        stats(static_cast<A*>(args.stats)) {}

  struct Row {
    int64_t i;
    int64_t y;
    A x_y;  // the logit of class y
  };

  __device__ __forceinline__ Row row(int64_t i) const {
    Row row{i, target.class_of(i), 0};
    if (TargetOf::kHasHot && row.y != kIgnored) row.x_y = to<A>(logits[i * stride + row.y]);
    return row;
  }

  struct Item {
    Packed<T, N> x;
    typename TargetOf::Probabilities t;
  };

  __device__ __forceinline__ void add(const Row& row, const Team& team, Sums* sums) const {
    if (row.y == kIgnored) return;
    const T* x = logits + row.i * stride;
    const Q* t = target.row(TargetOf::kHasHot ? 0 : row.i);
    const int offset = offset_of(x);
    const bool t_aligned = TargetOf::kHasHot || offset_of(t) == 0;
    const bool w_aligned = offset_of(target.weight) == 0;
    const T none = Rounded<T>::from(-HUGE_VALF);  // adds exp(-inf)
    for_each_batch<N, TargetOf::kMayShift>(
        target.classes, 0, t_aligned ? offset : -1, team,
        [&](const Piece& piece, Loads loads) {
          return Item{TargetOf::load_logits(x, piece, loads, offset, none),
                      target.load(t, piece, loads, t_aligned)};
        },
        [&](const Piece* pieces, const Item* items) {
          raise(items, sums);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (pieces[u].end > 0) add_piece(pieces[u], items[u], w_aligned, sums);
          }
        });
  }

  // Where the largest of some logits is larger than all before, it becomes the maximum.
  static __device__ __forceinline__ void raise(const Item* items, Sums* sums) {
    A high = -HUGE_VALF;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < N; ++j) high = larger(high, element(items[u].x, j));  // not NaN
    }
    if (high > sums->max) raise_maximum(sums, high);
  }

  __device__ __forceinline__ void add_piece(const Piece& piece, const Item& item, bool w_aligned,
                                            Sums* sums) const {
    const A max = origin(sums->max);
    A z[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = element(item.x, j) - max;
      sums->exp += exponential(z[j]);
    }
    if constexpr (kHasSpread) {
      const auto q = target.spread(item.t, piece, w_aligned);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sums->mass += q.at[j];
        sums->dot = ::fma(q.at[j], piece.has(j) ? z[j] : A(0), sums->dot);
      }
    }
  }

  static __device__ __forceinline__ void merge(Sums* sums, const Sums& other) {
    ksam::merge(sums, other);
  }

  static __device__ __forceinline__ Sums from_lane(const Sums& sums, int by) {
    Sums other;
    other.max = __shfl_xor_sync(kAllLanes, sums.max, by);
    other.exp = __shfl_xor_sync(kAllLanes, sums.exp, by);
    if constexpr (kHasSpread) {
      other.mass = __shfl_xor_sync(kAllLanes, sums.mass, by);
      other.dot = __shfl_xor_sync(kAllLanes, sums.dot, by);
    }
    return other;
  }

  static __device__ __forceinline__ Sums load(const Sums* p) {
    return {__ldcg(&p->max), __ldcg(&p->exp), __ldcg(&p->mass), __ldcg(&p->dot)};
  }

  __device__ __forceinline__ void finish(const Row& row, const Sums& sums) const {
    RowStats<A> result{0, 0, 0};
    A loss = 0;
    if (row.y != kIgnored) {
      const A hot = target.hot(row.y);
      result = stats_of(sums, hot);
      loss = loss_of(sums, result.log_s, hot, TargetOf::kHasHot ? row.x_y - sums.max : A(0));
    }
    losses[row.i] = static_cast<float>(loss);
    if (stats == nullptr) return;
    A* to = stats + 3 * row.i;
    to[0] = result.max;
    to[1] = result.log_s;
    to[2] = result.mass;
  }
};

// Indices of the k largest losses, by the last block; k = 0: none.
struct Selection {
  unsigned* ticket;
  const float* losses;  // [n]
  int64_t n, k;
  int64_t* indices;  // [k]

  __device__ __forceinline__ bool is_wanted() const { return k > 0; }
  __device__ __forceinline__ void run() const {
    __shared__ SelectShared shared;
    select_by_block(losses, n, k, shared, indices);
  }
};

RowPlan plan_of(const CrossEntropy& args) {
  const int per_vector = kVectorBytes / (args.logits.dtype == DType::f64   ? 8
                                         : args.logits.dtype == DType::f32 ? 4
                                                                           : 2);
  return plan_rows(args.logits.rows, args.logits.columns, per_vector);
}

void run(const CrossEntropy& args, const Selection& selection, void* scratch, Stream stream) {
  on_target(args, [&](auto type) {
    using Types = decltype(type);
    const RowLosses<typename Types::Logit, typename Types::Probability, Types::kind> rows(args);
    launch_reduction(rows, args.logits.rows, plan_of(args), selection, selection.k > 0, scratch,
                     stream);
  });
}

int64_t scratch_bytes(const CrossEntropy& args, bool selects) {
  if (args.logits.rows == 0) return 0;
  using Largest = RowLosses<double, double, Kind::probabilities>;
  return reduction_scratch_bytes<Largest>(args.logits.rows, plan_of(args), selects);
}

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

int64_t cross_entropy_scratch_bytes(const CrossEntropy& args) { return scratch_bytes(args, false); }

void cross_entropy(const CrossEntropy& args, void* scratch, Stream stream) {
  if (args.logits.rows == 0) return;
  run(args, Selection{nullptr, nullptr, 0, 0, nullptr}, scratch, stream);
}

int64_t select_cross_entropy_scratch_bytes(const CrossEntropy& args) {
  const int64_t rows = args.logits.rows;
  if (rows <= kSelectedByBlock) return scratch_bytes(args, true);
  return round_up(scratch_bytes(args, false)) + topk_scratch_bytes(rows);
}

void select_cross_entropy(const CrossEntropy& args, int64_t k, void* scratch, int64_t* indices,
                          Stream stream) {
  const int64_t rows = args.logits.rows;
  if (rows <= kSelectedByBlock) {
    run(args, Selection{nullptr, args.losses, rows, k, indices}, scratch, stream);
    return;
  }
  cross_entropy(args, scratch, stream);
  Tensor losses;
  losses.data = reinterpret_cast<char*>(args.losses);
  losses.dtype = DType::f32;
  losses.numel = rows;
  void* rest = static_cast<char*>(scratch) + round_up(scratch_bytes(args, false));
  topk_indices(losses, k, rest, indices, stream);
}

}  // namespace ksam::gpu
