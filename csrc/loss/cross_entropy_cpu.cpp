// Cross-entropy of every row, in one pass over the logits.
//
// Bytes moved: each logit once, and each probability where the target has them; per row a class,
// 4 for the loss and 12 for the statistics, if they are wanted. A block of a row is looked at
// twice, for its maximum and for its sums, the second time in the first-level cache.
#include "loss/elementary_cpu.h"
#include "loss/loss_row.h"
#include "loss/target_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Rows of fewer classes are narrow: up to here sums across lanes cost more than the transposition.
constexpr int64_t kNarrow = 2 * kLanes;

template <class T>
KSAM_INLINE opmath_t<T> largest(const T* x, int64_t n) {
  using V = Lanes<T>;
  V high = load_lanes<V>(x);
  for_each_vector(n, [&](int64_t i) KSAM_INLINE_LAMBDA {
    high = larger(load_lanes<V>(x + i), high);
  });
  return largest_lane(high);
}

// One row of at least kLanes classes.
template <bool kSpread, class T, class A>
KSAM_INLINE RowSums<A> wide_row(const CrossEntropy& args, const Target<A>& target, int64_t row,
                                A* room) {
  using V = Lanes<T>;
  const T* logits = row_of<T>(args.logits, row);
  RowSums<A> sums;
  for_each_block(args.logits.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const T* x = logits + begin;
    const A high = largest(x, n);
    if (high > sums.max) raise_maximum(&sums, high);
    const V max = all_lanes<V>(origin(sums.max));
    const A* spread = kSpread ? target.spread(row, begin, n, room) : nullptr;
    V exp{}, mass{}, dot{};
    for_each_sum<V>(n, [&](int64_t i, const auto& kept) KSAM_INLINE_LAMBDA {
      const V z = load_lanes<V>(x + i) - max;
      exp = exp + kept(exp_term(z));
      if constexpr (kSpread) {
        const V q = load_lanes<V>(spread + i);
        mass = mass + kept(q);
        dot = dot + kept(q * z);
      }
    });
    sums.exp += sum_of_lanes(exp);
    if constexpr (kSpread) {
      sums.mass += sum_of_lanes(mass);
      sums.dot += sum_of_lanes(dot);
    }
  });
  return sums;
}

// Up to sixteen rows of fewer than kNarrow classes, a lane each.
template <bool kSpread, class T, class A>
KSAM_INLINE void narrow_rows(const CrossEntropy& args, const Target<A>& target, int64_t begin,
                             int64_t count, A* room, RowSums<A>* sums) {
  using V = Lanes<T>;
  const int64_t classes = args.logits.columns;
  Tile<T, kNarrow> x(classes);
  Tile<A, kNarrow> spread(kSpread ? classes : 0);
  for (int64_t i = 0; i < count; ++i) {
    put_row(row_of<T>(args.logits, begin + i), classes, i, &x);
    if constexpr (kSpread) put_row(target.spread(begin + i, 0, classes, room), classes, i, &spread);
  }
  V max = load_lanes<V>(x.at[0]);
  for (int64_t c = 1; c < classes; ++c) max = larger(load_lanes<V>(x.at[c]), max);
  V exp{}, mass{}, dot{};
  for (int64_t c = 0; c < classes; ++c) {
    const V z = load_lanes<V>(x.at[c]) - max;
    exp = exp + exp_term(z);
    if constexpr (kSpread) {
      const V q = load_lanes<V>(spread.at[c]);
      mass = mass + q;
      dot = dot + q * z;
    }
  }
  A lanes[4][kLanes];
  store_lanes(lanes[0], max);
  store_lanes(lanes[1], exp);
  store_lanes(lanes[2], mass);
  store_lanes(lanes[3], dot);
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = {lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]};
  }
}

template <class T, class A>
KSAM_INLINE void write_row(const CrossEntropy& args, const Target<A>& target, int64_t row,
                           int64_t y, const RowSums<A>& sums) {
  RowStats<A> stats{0, 0, 0};
  A loss = 0;
  if (y != kIgnored) {
    const A hot = target.hot(y);
    const A z_y = target.has_hot() ? load_one(row_of<T>(args.logits, row) + y) - sums.max : 0;
    stats = stats_of(sums, hot);
    loss = loss_of(sums, stats.log_s, hot, z_y);
  }
  args.losses[row] = static_cast<float>(loss);
  if (args.stats != nullptr) {
    std::memcpy(static_cast<A*>(args.stats) + 3 * row, &stats, sizeof(stats));
  }
}

template <bool kSpread, class T>
void forward_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
  using A = opmath_t<T>;
  const Target<A> target(args);
  const int64_t classes = args.logits.columns;
  alignas(64) A room[kBlockRoom];
  if constexpr (kSpread) target.fill_constant(room, classes < kBlockRoom ? classes : kBlockRoom);
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = end - row < kLanes ? end - row : kLanes;
    int64_t y[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      y[i] = target.class_of(row + i);
      if (y[i] == kOutOfRange) return note_bad(row + i, args.first_bad);
    }
    RowSums<A> sums[kLanes];
    if (classes < kNarrow) narrow_rows<kSpread, T>(args, target, row, count, room, sums);
    for (int64_t i = 0; i < count; ++i) {
      if (classes >= kNarrow && y[i] != kIgnored) {
        sums[i] = wide_row<kSpread, T>(args, target, row + i, room);
      }
      write_row<T>(args, target, row + i, y[i], sums[i]);
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropy& args) {
  on_floating(args.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool has_spread = Target<opmath_t<T>>(args).has_spread();
    parallel_for(args.logits.rows, row_grain(args.logits.columns), [&](int64_t begin, int64_t end) {
      has_spread ? forward_rows<true, T>(args, begin, end)
                 : forward_rows<false, T>(args, begin, end);
    });
  });
}

}  // namespace ksam::KSAM_ISA
