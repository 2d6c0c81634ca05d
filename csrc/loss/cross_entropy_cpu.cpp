// Cross-entropy of every row, in one pass over the logits.
//
// Bytes moved: each logit once, and each probability where the target has them; per row a class,
// 4 for the loss and, where a gradient is wanted, 12 for the statistics (float64: 24). A block of a
// row is read twice, for its maximum and for its sums; the second time from the first-level cache.
#include "loss/elementary_cpu.h"
#include "loss/loss_row.h"
#include "loss/target_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Rows of fewer classes are narrow: sums across lanes would cost more than transposing them does.
constexpr int64_t kNarrow = 2 * kLanes;

// RowSums of sixteen rows, a lane each, and the logits of their classes.
template <class A>
struct LaneSums {
  A max[kLanes], exp[kLanes], mass[kLanes], dot[kLanes], x_y[kLanes];

  KSAM_INLINE void put(int64_t lane, const RowSums<A>& row) {
    max[lane] = row.max;
    exp[lane] = row.exp;
    mass[lane] = row.mass;
    dot[lane] = row.dot;
  }

  // The logits of the rows' classes.
  template <class T>
  KSAM_INLINE void put_classes(const Matrix& m, int64_t first, const int64_t* y) {
    const T* x = m.in_planes() ? plane_of<T>(m, first) : row_of<T>(m, first);
    const int64_t row = m.in_planes() ? 1 : m.stride, column = m.in_planes() ? m.plane_stride : 1;
    for (int64_t i = 0; i < kLanes; ++i) {
      x_y[i] = y[i] == kIgnored ? 0 : load_one(x + i * row + y[i] * column);
    }
  }

  template <class V>
  KSAM_INLINE void store(const V& max_, const V& exp_, const V& mass_, const V& dot_) {
    store_lanes(max, max_);
    store_lanes(exp, exp_);
    store_lanes(mass, mass_);
    store_lanes(dot, dot_);
  }

  template <class V>
  KSAM_INLINE RowSums<V> load() const {
    return {load_lanes<V>(max), load_lanes<V>(exp), load_lanes<V>(mass), load_lanes<V>(dot)};
  }
};

template <class T>
KSAM_INLINE Opmath<T> largest(const T* x, int64_t n) {
  using V = Lanes<T>;
  V high = load_lanes<V>(x);
  for_each_vector(n,
                  [&](int64_t i) KSAM_INLINE_LAMBDA { high = larger(load_lanes<V>(x + i), high); });
  return largest_lane(high);
}

// One row of at least kLanes classes.
template <bool kSpread, class T, class A>
KSAM_INLINE RowSums<A> wide_row(const CrossEntropy& args, const Target<A>& target, int64_t row,
                                A* buffer) {
  using V = Lanes<T>;
  const T* logits = row_of<T>(args.logits, row);
  RowSums<A> sums{};  // {}, as a constructor would be an inline function: common/isa.h
  for_each_block(args.logits.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const T* x = logits + begin;
    const A high = largest(x, n);
    if (high > sums.max) raise_maximum(&sums, high);
    const V max = all_lanes<V>(origin(sums.max));
    const A* spread = kSpread ? target.spread(row, begin, n, buffer) : nullptr;
    V exp{}, mass{}, dot{};
    for_each_sum<V>(n, [&](int64_t i, const auto& fresh) KSAM_INLINE_LAMBDA {
      const V z = load_lanes<V>(x + i) - max;
      exp = exp + fresh(exp_term(z));
      if constexpr (kSpread) {
        const V q = load_lanes<V>(spread + i);
        mass = mass + fresh(q);
        dot = dot + fresh(q * z);
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

// Up to sixteen rows of at least kNarrow classes, one after the other.
template <bool kSpread, class T, class A>
KSAM_INLINE void wide_rows(const CrossEntropy& args, const Target<A>& target, const Sixteen& rows,
                           const int64_t* y, A* buffer, LaneSums<A>* sums) {
  *sums = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    if (y[i] == kIgnored) continue;
    sums->put(i, wide_row<kSpread, T>(args, target, rows.first + i, buffer));
  }
}

// Up to sixteen rows of fewer than kNarrow classes, a lane each.
template <bool kSpread, class T, class A>
KSAM_INLINE void narrow_rows(const CrossEntropy& args, const Target<A>& target, int64_t begin,
                             int64_t count, A* buffer, LaneSums<A>* sums) {
  using V = Lanes<T>;
  const int64_t classes = args.logits.columns;
  Tile<T, kNarrow> x(classes);
  Tile<A, kNarrow> spread(kSpread ? classes : 0);
  for (int64_t i = 0; i < count; ++i) {
    put_row(row_of<T>(args.logits, begin + i), classes, i, &x);
    if constexpr (kSpread) {
      put_row(target.spread(begin + i, 0, classes, buffer), classes, i, &spread);
    }
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
  sums->store(max, exp, mass, dot);
}

// raise_maximum() in every lane. The masks keep infinity times 0, which is NaN, out of lanes whose
// maximum does not rise.
template <class V>
KSAM_INLINE void raise_maxima(const V& high, V* max, V* exp, V* mass, V* dot) {
  *exp = masked(*exp * exp_term(*max - high), *exp);
  const V rise = origins(*max) - origins(high);
  *dot = *dot + masked(masked(*mass * rise, *mass), rise);
  *max = high;
}

// Sixteen rows in planes, a lane each. A block of classes is staged, as it is read twice: the
// distance between planes may map all of them to the same cache set, which would not hold them.
template <bool kSpread, class T, class A>
KSAM_INLINE void plane_rows(const CrossEntropy& args, const Target<A>& target, int64_t begin,
                            A* buffer, LaneSums<A>* sums) {
  using V = Lanes<T>;
  const int64_t classes = args.logits.columns;
  const T* plane = plane_of<T>(args.logits, begin);
  const char* spread = target.first_plane(begin);
  alignas(64) A x[kPlanes][kLanes];
  V max = all_lanes<V>(-HUGE_VALF), exp{}, mass{}, dot{};
  for (int64_t first = 0; first < classes; first += kPlanes) {
    const int64_t n = classes - first < kPlanes ? classes - first : kPlanes;
    V high = max;
    for (int64_t c = 0; c < n; ++c, plane += args.logits.plane_stride) {
      __builtin_prefetch(plane + kAhead);
      const V at = load_lanes<V>(plane);
      store_lanes(x[c], at);
      high = larger(at, high);
    }
    if (first == 0) {
      max = high;
    } else {
      raise_maxima(high, &max, &exp, &mass, &dot);
    }
    const V from = origins(max);
    for (int64_t c = 0; c < n; ++c) {
      const V z = load_lanes<V>(x[c]) - from;
      exp = exp + exp_term(z);
      if constexpr (kSpread) {
        target.spread_plane(spread, first + c, buffer);
        const V q = load_lanes<V>(buffer);
        mass = mass + q;
        dot = dot + q * z;
      }
    }
  }
  sums->store(max, exp, mass, dot);
}

// Writes the losses and statistics of those of sixteen rows that count; y: their classes.
template <class T, class A>
KSAM_INLINE void write_rows(const CrossEntropy& args, const Target<A>& target, const Sixteen& rows,
                            const int64_t* y, const LaneSums<A>& sums) {
  using V = Lanes<T>;
  const RowSums<V> row_sums = sums.template load<V>();
  const V hot = target.template hot_lanes<V>(y), counted = counted_lanes<V>(y);
  // exp is 0 only where all logits are -inf.
  const V log_s = where_zero(row_sums.exp, all_lanes<V>(NAN), log(row_sums.exp));
  const V z_y = load_lanes<V>(sums.x_y) - row_sums.max;
  const V loss = loss_of(row_sums, log_s, hot, target.has_hot() ? z_y : V{});
  A lanes[4][kLanes];
  store_lanes(lanes[0], masked(loss, counted));
  store_lanes(lanes[1], masked(row_sums.max, counted));
  store_lanes(lanes[2], masked(log_s, counted));
  store_lanes(lanes[3], masked(hot + row_sums.mass, counted));
  const int64_t end = rows.lane + rows.count;
  for (int64_t i = rows.lane; i < end; ++i) {
    args.losses[rows.first + i] = static_cast<float>(lanes[0][i]);
  }
  if (args.stats == nullptr) return;
  A* stats = static_cast<A*>(args.stats) + 3 * rows.first;
  for (int64_t i = rows.lane; i < end; ++i) {
    for (int j = 0; j < 3; ++j) stats[3 * i + j] = lanes[1 + j][i];
  }
}

template <bool kSpread, class T>
void forward_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
  using A = Opmath<T>;
  const Target<A> target(args);
  const int64_t classes = args.logits.columns;
  alignas(64) A buffer[kBlockCapacity];
  if constexpr (kSpread) target.fill_constant(buffer);
  Sixteen rows;
  for (int64_t row = begin; row < end; row += rows.count) {
    rows = sixteen_rows(args.logits, row, end);
    int64_t y[kLanes];
    if (!classes_of(target, rows, args.first_bad, y)) return;
    LaneSums<A> sums;
    if (args.logits.in_planes()) {
      plane_rows<kSpread, T>(args, target, rows.first, buffer, &sums);
    } else if (classes < kNarrow) {
      narrow_rows<kSpread, T>(args, target, rows.first, rows.count, buffer, &sums);
    } else {
      wide_rows<kSpread, T>(args, target, rows, y, buffer, &sums);
    }
    sums.template put_classes<T>(args.logits, rows.first, y);
    write_rows<T>(args, target, rows, y, sums);
  }
}

}  // namespace

void cross_entropy(const CrossEntropy& args) {
  on_floating(args.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool has_spread = Target<Opmath<T>>(args).has_spread();
    parallel_for(args.logits.rows, row_grain(args.logits.columns), [&](int64_t begin, int64_t end) {
      has_spread ? forward_rows<true, T>(args, begin, end)
                 : forward_rows<false, T>(args, begin, end);
    });
  });
}

}  // namespace ksam::KSAM_ISA
