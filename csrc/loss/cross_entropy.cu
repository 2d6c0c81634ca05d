// Cross-entropy of every row in one pass over the logits and, if wanted, the selection of the rows
// with the largest losses. Sums are relative to the largest logit so far, which rises a few times a
// row (loss_row.h).
//
// Bytes moved: each logit once, and each probability where the target has them; per row a class,
// 4 for the loss and, where a gradient is wanted, 12 for the statistics (float64: 24). Selection:
// topk/select.cuh; the losses it reads lie in the cache. Launches: 1; selecting from more than
// kSelectedByBlock rows, or from rows in planes, is one more.
#include "loss/cross_entropy.cuh"
#include "topk/select.cuh"
#include "topk/topk.h"

namespace ksam::gpu {
namespace {

// Up to this many losses, the last block selects; more are worth a second launch.
constexpr int64_t kSelectedByBlock = gpu_or_simt(2048, 64);
// Losses that each thread of that block holds in registers.
constexpr int kHeld = gpu_or_simt(8, 2);

// kWhole: all rows are whole vectors at vectors' boundaries, so that there is only one way to load.
template <class T, class Q, Kind kKind, bool kWhole>
struct RowLosses : Losses<T, Q, kKind> {
  using Base = Losses<T, Q, kKind>;
  using Base::target;
  using typename Base::A;
  using typename Base::Row;
  using typename Base::Sums;
  using typename Base::TargetOf;
  static constexpr int N = kPerVector<T>;
  static constexpr Resident kResident = resident_row_losses(kKind, sizeof(T), kWhole);
  static constexpr int kBatches = batches_of_span(kKind, sizeof(T));
  static constexpr bool kHasSpread = TargetOf::kHasSpread;

  const T* logits;  // [rows, classes]
  int64_t stride;   // between rows

  explicit RowLosses(const CrossEntropy& args)
      : Base(args),
        logits(reinterpret_cast<const T*>(args.logits.data)),
        stride(args.logits.stride) {}

  __device__ __forceinline__ Row row(int64_t i) const { return {i, false, 0, T()}; }

  __device__ __forceinline__ void settle(Row* row) const {
    Base::settle(row, logits + row->i * stride, 1);
  }

  struct Item {
    Packed<T, N> x;
    typename TargetOf::Probabilities t;
  };

  template <int kThreads>
  __device__ __forceinline__ void add(Row* row, const Team<kThreads>& team, Sums* sums) const {
    const T* x = logits + row->i * stride;
    const Q* t = target.row(TargetOf::kHasHot ? 0 : row->i);
    const int offset = kWhole ? 0 : offset_of(x);
    const bool t_aligned = TargetOf::kHasHot || offset_of(t) == 0;
    const bool w_aligned = offset_of(target.weight) == 0;
    const T none = Rounded<T>::from(-HUGE_VALF);  // adds exp(-inf)
    const auto load = [&](const Piece& piece, Loads loads) {
      return Item{TargetOf::load_logits(x, piece, loads, offset, none),
                  target.load(t, piece, loads, t_aligned)};
    };
    const auto use = [&](const Piece* pieces, const Item* items) {
      if (!row->is_settled) Base::find_class(row);
      if (row->y == kIgnored) return false;
      raise(items, sums);
      if (!row->is_settled) Base::ask_for_logit(row, x, 1);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // Without a spread, adding an empty piece does no harm: exp(-inf) is 0.
        if (kHasSpread && pieces[u].end <= 0) continue;
        add_piece(pieces[u], items[u], w_aligned, sums);
      }
      return true;
    };
    if constexpr (kWhole) {
      for_each_whole_batch<N, kBatches>(target.classes, team, load, use);
    } else {
      for_each_batch<N, TargetOf::kMayShift, kBatches>(target.classes, 0, t_aligned ? offset : -1,
                                                       team, load, use);
    }
  }

  // Makes the largest of some logits the maximum, if it is larger than all before.
  static __device__ __forceinline__ void raise(const Item* items, Sums* sums) {
    const A high = largest(items);
    if (high > sums->max) raise_maximum(sums, high);
  }

  // The largest of the items' logits; NaN only if all are NaN.
  static __device__ __forceinline__ A largest(const Item* items) {
    A high = element(items[0].x, 0);
    if constexpr (sizeof(T) == 2) {
      Packed<T, 2> pair{items[0].x.words[0]};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          pair.words[0] = larger_pair(pair.words[0], items[u].x.words[i], T());
        }
      }
      high = larger(element(pair, 0), element(pair, 1));
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int j = 0; j < N; ++j) high = larger(high, element(items[u].x, j));
      }
    }
    return high;
  }

  __device__ __forceinline__ void add_piece(const Piece& piece, const Item& item, bool w_aligned,
                                            Sums* sums) const {
    const A max = origin(sums->max);
    A z[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = element(item.x, j) - max;
      sums->exp += quick_exponential(z[j]);
    }
    if constexpr (kHasSpread) {
      // Most pieces are whole: here the compiler knows that they have every element.
      if (kWhole || (piece.begin == 0 && piece.end == N)) {
        add_spread({piece.first, 0, N}, z, item, w_aligned, sums);
      } else {
        add_spread(piece, z, item, w_aligned, sums);
      }
    }
  }

  __device__ __forceinline__ void add_spread(const Piece& piece, const A (&z)[N], const Item& item,
                                             bool w_aligned, Sums* sums) const {
    if (kKind == Kind::smoothed && target.weight == nullptr) {  // all classes have the same spread
      A sum = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) sum = ::fma(target.uniform, piece.has(j) ? z[j] : A(0), sum);
      sums->mass = ::fma(target.uniform, static_cast<A>(piece.end - piece.begin), sums->mass);
      sums->dot += sum;
      return;
    }
    const auto q = target.spread(item.t, piece, w_aligned);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sums->mass += q.at[j];
      sums->dot = ::fma(q.at[j], piece.has(j) ? z[j] : A(0), sums->dot);
    }
  }

  // The lanes agree on the maximum first, so that each rescales its sums once and the rest is sums.
  static __device__ __forceinline__ void merge_lanes(int shift, Sums* sums) {
    const A max = over_lanes(shift, sums->max, [](A a, A b) { return larger(a, b); });
    if (max > sums->max) raise_maximum(sums, max);
    sums->exp = sum_over_lanes(shift, sums->exp);
    if constexpr (kHasSpread) {
      sums->mass = sum_over_lanes(shift, sums->mass);
      sums->dot = sum_over_lanes(shift, sums->dot);
    }
  }

  static __device__ __forceinline__ Sums load(const Sums* p) {
    return {__ldcg(&p->max), __ldcg(&p->exp), __ldcg(&p->mass), __ldcg(&p->dot)};
  }

  __device__ __forceinline__ void finish(Row row, const Sums& sums) const {
    settle(&row);
    Base::write(row, sums);
  }
};

// The selection of the k largest losses by the last block; with k = 0 there is none.
struct Selection {
  unsigned* ticket;
  const float* losses;  // [n]
  int64_t n, k;
  int64_t* indices;  // [k]

  __device__ __forceinline__ bool is_wanted() const { return k > 0; }
  __device__ __forceinline__ void run() const {
    __shared__ SelectShared shared;
    select_by_block<kHeld>(losses, n, k, shared, indices);
  }
};

// Whether the rows allow the kernel with kWhole.
bool is_whole(const CrossEntropy& args) {
  const int64_t itemsize = size_of(args.logits.dtype);
  const auto address = reinterpret_cast<uintptr_t>(args.logits.data);
  return batches_of_span(kind_of(args), static_cast<int>(itemsize)) > 1 &&
         address % kVectorBytes == 0 && args.logits.stride * itemsize % kVectorBytes == 0 &&
         args.logits.columns * itemsize % kVectorBytes == 0 &&
         args.logits.columns * itemsize / kVectorBytes < kMostWholeVectors;
}

RowPlan plan_of(const CrossEntropy& args, bool whole) {
  const int itemsize = size_of(args.logits.dtype), per_vector = kVectorBytes / itemsize;
  const Kind kind = kind_of(args);
  return plan_rows(args.logits.rows, args.logits.columns, per_vector,
                   kUnroll * batches_of_span(kind, itemsize),
                   resident_row_losses(kind, itemsize, whole));
}

void run(const CrossEntropy& args, const Selection& selection, void* scratch, Stream stream) {
  const bool whole = is_whole(args);
  on_target(args, [&](auto type) {
    using Types = decltype(type);
    using T = typename Types::Logit;
    using Q = typename Types::Probability;
    const auto launch_rows = [&](const auto& losses) {
      launch_reduction(losses, args.logits.rows, plan_of(args, whole), selection, selection.k > 0,
                       scratch, stream);
    };
    if constexpr (batches_of_span(Types::kind, sizeof(T)) > 1) {
      if (whole) return launch_rows(RowLosses<T, Q, Types::kind, true>(args));
    }
    launch_rows(RowLosses<T, Q, Types::kind, false>(args));
  });
}

int64_t scratch_bytes(const CrossEntropy& args, bool selects) {
  if (args.logits.rows == 0 || args.logits.in_planes()) return 0;
  using Largest = RowLosses<double, double, Kind::probabilities, false>;
  const RowPlan plan = plan_of(args, is_whole(args));
  return reduction_scratch_bytes<Largest>(args.logits.rows, plan, selects);
}

// Whether the last block selects, in the launch that writes the losses.
bool is_fused(const CrossEntropy& args) {
  return args.logits.rows <= kSelectedByBlock && !args.logits.in_planes();
}

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

int64_t cross_entropy_scratch_bytes(const CrossEntropy& args) { return scratch_bytes(args, false); }

void cross_entropy(const CrossEntropy& args, void* scratch, Stream stream) {
  if (args.logits.rows == 0) return;
  if (args.logits.in_planes()) return cross_entropy_in_planes(args, stream);
  run(args, Selection{nullptr, nullptr, 0, 0, nullptr}, scratch, stream);
}

int64_t select_cross_entropy_scratch_bytes(const CrossEntropy& args) {
  if (is_fused(args)) return scratch_bytes(args, true);
  return round_up(scratch_bytes(args, false)) + topk_scratch_bytes(args.logits.rows);
}

void select_cross_entropy(const CrossEntropy& args, int64_t k, void* scratch, int64_t* indices,
                          Stream stream) {
  const int64_t rows = args.logits.rows;
  if (is_fused(args)) {
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
