// Cross-entropy of every row, in one pass over the logits.
//
// Bytes moved: each logit once, and each probability where the target has them; per row a class,
// 4 for the loss and 12 for the statistics. A block of a row is looked at twice, for its maximum
// and for its sums, the second time in the first-level cache.
#include "loss/elementary_cpu.h"
#include "loss/loss_row.h"
#include "loss/target_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Sixteen lanes of RowSums about one maximum.
template <class V>
struct LaneSums {
  V exp, mass, dot;

  KSAM_INLINE friend LaneSums operator+(const LaneSums& a, const LaneSums& b) {
    return {a.exp + b.exp, a.mass + b.mass, a.dot + b.dot};
  }
  KSAM_INLINE friend LaneSums masked(const LaneSums& a, const V& keep) {
    return {masked(a.exp, keep), masked(a.mass, keep), masked(a.dot, keep)};
  }
};

template <class V>
KSAM_INLINE LaneSums<V> terms(const V& z, const V& spread) {
  return {exp_term(z), spread, spread * z};
}

template <class T>
KSAM_INLINE opmath_t<T> largest(const T* x, int64_t n) {
  using V = Lanes<T>;
  V high = load_lanes<V>(x);
  for_each_vector(n, [&](int64_t i) { high = larger(load_lanes<V>(x + i), high); });
  return largest_lane(high);
}

// One row of at least kLanes classes.
template <bool kSpread, class T, class A>
KSAM_INLINE RowSums<A> wide_row(const CrossEntropy& args, const Target<A>& target, int64_t row,
                                A* room) {
  using V = Lanes<T>;
  const T* logits = row_of<T>(args.logits, row);
  RowSums<A> sums;
  for_each_block(args.logits.columns, [&](int64_t begin, int64_t n) {
    const T* x = logits + begin;
    const A high = largest(x, n);
    if (high > sums.max) raise_maximum(&sums, high);
    const V max = all_lanes<V>(origin(sums.max));
    if constexpr (kSpread) {
      const A* spread = target.spread(row, begin, n, room);
      const LaneSums<V> block = sum_of_terms<V>(n, [&](int64_t i) {
        return terms(load_lanes<V>(x + i) - max, load_lanes<V>(spread + i));
      });
      sums.exp += sum_of_lanes(block.exp);
      sums.mass += sum_of_lanes(block.mass);
      sums.dot += sum_of_lanes(block.dot);
    } else {
      sums.exp += sum_of_lanes(
          sum_of_terms<V>(n, [&](int64_t i) { return exp_term(load_lanes<V>(x + i) - max); }));
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
  Tile<T> x{};
  Tile<A> spread;
  for (int64_t i = 0; i < count; ++i) {
    put_row(row_of<T>(args.logits, begin + i), classes, i, &x);
    if constexpr (kSpread) put_row(target.spread(begin + i, 0, classes, room), classes, i, &spread);
  }
  V max = load_lanes<V>(x.at);
  for (int64_t c = 1; c < classes; ++c) max = larger(load_lanes<V>(x.at + c * kLanes), max);
  LaneSums<V> total{};
  for (int64_t c = 0; c < classes; ++c) {
    const V z = load_lanes<V>(x.at + c * kLanes) - max;
    const V q = kSpread ? load_lanes<V>(spread.at + c * kLanes) : V{};
    total = total + terms(z, q);
  }
  A lanes[4][kLanes];
  store_lanes(lanes[0], max);
  store_lanes(lanes[1], total.exp);
  store_lanes(lanes[2], total.mass);
  store_lanes(lanes[3], total.dot);
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = {lanes[0][i], lanes[1][i], kSpread ? lanes[2][i] : 0, kSpread ? lanes[3][i] : 0};
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
  std::memcpy(static_cast<A*>(args.stats) + 3 * row, &stats, sizeof(stats));
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
