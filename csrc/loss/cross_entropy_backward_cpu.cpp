// Gradient of cross-entropy: dx_c = g (mass p_c - q_c) with p_c = exp(x_c - m - log s), from the
// statistics (m, log s, mass) of the forward pass; 0 in ignored rows.
//
// Bytes moved: each logit once, each element of the gradient once, and each probability where the
// target has them; per row a class, 4 for g and 12 for the statistics (float64: 24).
#include "loss/elementary_cpu.h"
#include "loss/target_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Rows of fewer classes are narrow, as they do not fill a vector.
constexpr int64_t kNarrow = kLanes;

// What the gradient of a row is made of, for one row or for sixteen with a lane each.
template <class V>
struct Slope {
  V max, log_s, mass, grad;

  KSAM_INLINE V at(const V& x, const V& q) const {
    return grad * (mass * exp_accurate(x - max - log_s) - q);
  }
};

template <class A>
KSAM_INLINE Slope<A> slope_of(const CrossEntropyGradient& args, int64_t row) {
  const A* stats = static_cast<const A*>(args.forward.stats) + 3 * row;
  return {stats[0], stats[1], stats[2], static_cast<A>(*row_of<float>(args.grad, row))};
}

template <class A>
KSAM_INLINE void put_slope(const Slope<A>& row, int64_t lane, A (*rows)[kLanes]) {
  rows[0][lane] = row.max;
  rows[1][lane] = row.log_s;
  rows[2][lane] = row.mass;
  rows[3][lane] = row.grad;
}

template <class V, class A>
KSAM_INLINE Slope<V> slope_of_lanes(const A (*rows)[kLanes]) {
  return {load_lanes<V>(rows[0]), load_lanes<V>(rows[1]), load_lanes<V>(rows[2]),
          load_lanes<V>(rows[3])};
}

// One row of at least kLanes classes.
template <class T, class A>
KSAM_INLINE void wide_row(const CrossEntropyGradient& args, const Target<A>& target, int64_t row,
                          int64_t y, A* buffer) {
  using V = Lanes<T>;
  const Slope<A> of_row = slope_of<A>(args, row);
  const Slope<V> slope = {all_lanes<V>(of_row.max), all_lanes<V>(of_row.log_s),
                          all_lanes<V>(of_row.mass), all_lanes<V>(of_row.grad)};
  const T* logits = row_of<T>(args.forward.logits, row);
  T* out = row_of<T>(args.out, row);
  for_each_block(args.forward.logits.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const A* q = target.spread(row, begin, n, buffer);
    const bool has_class = target.has_hot() && y >= begin && y < begin + n;
    const A spread = has_class ? buffer[y - begin] : 0;
    if (has_class) buffer[y - begin] += target.hot(y);
    for_each_vector(n, [&](int64_t i) KSAM_INLINE_LAMBDA {
      const V x = load_lanes<V>(logits + begin + i);
      store_lanes(out + begin + i, slope.at(x, load_lanes<V>(q + i)));
    });
    if (has_class) buffer[y - begin] = spread;
  });
}

// Up to sixteen rows of fewer than kNarrow classes, a lane each. Lanes of ignored rows hold zeros,
// so that their gradient is 0.
template <class T, class A>
KSAM_INLINE void narrow_rows(const CrossEntropyGradient& args, const Target<A>& target,
                             int64_t begin, int64_t count, const int64_t* y, A* buffer) {
  using V = Lanes<T>;
  const int64_t classes = args.forward.logits.columns;
  Tile<T, kNarrow> x(classes);
  Tile<A, kNarrow> q(classes);
  A rows[4][kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (y[i] == kIgnored) continue;
    put_row(row_of<T>(args.forward.logits, begin + i), classes, i, &x);
    put_row(target.spread(begin + i, 0, classes, buffer), classes, i, &q);
    if (target.has_hot()) q.at[y[i]][i] += target.hot(y[i]);
    put_slope(slope_of<A>(args, begin + i), i, rows);
  }
  const Slope<V> slope = slope_of_lanes<V>(rows);
  for (int64_t c = 0; c < classes; ++c) {
    T* at = x.at[c];
    store_lanes(at, slope.at(load_lanes<V>(at), load_lanes<V>(q.at[c])));
  }
  for (int64_t i = 0; i < count; ++i) {
    take_row(x, classes, i, row_of<T>(args.out, begin + i));
  }
}

// Sixteen rows in planes, a lane each. Lanes of ignored rows are masked to 0.
template <class T, class A>
KSAM_INLINE void plane_rows(const CrossEntropyGradient& args, const Target<A>& target,
                            const Sixteen& of, const int64_t* y, A* buffer) {
  using V = Lanes<T>;
  const Matrix& logits = args.forward.logits;
  A rows[4][kLanes] = {}, ahead[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    ahead[i] = -1;  // no class is hot
    if (y[i] == kIgnored) continue;
    // Exact: as_planes() declines too many classes.
    if (target.has_hot()) ahead[i] = static_cast<A>(y[i]);
    put_slope(slope_of<A>(args, of.first + i), i, rows);
  }
  const Slope<V> slope = slope_of_lanes<V>(rows);
  const V hot = target.template hot_lanes<V>(y), counted = counted_lanes<V>(y);
  V ahead_lanes = load_lanes<V>(ahead);
  const T* x = plane_of<T>(logits, of.first);
  T* out = plane_of<T>(args.out, of.first);
  const char* spread = target.first_plane(of.first);
  for (int64_t c = 0; c < logits.columns; ++c) {
    __builtin_prefetch(x + kAhead);
    __builtin_prefetch(out + kAhead, 1);
    target.spread_plane(spread, c, buffer);
    const V rest = load_lanes<V>(buffer);
    const V q = where_zero(ahead_lanes, rest + hot, rest);
    const V dx = masked(slope.at(load_lanes<V>(x), q), counted);
    if (of.count == kLanes) {
      store_lanes(out, dx);
    } else {
      T some[kLanes];
      store_lanes(some, dx);
      std::memcpy(out + of.lane, some + of.lane, of.count * sizeof(T));
    }
    ahead_lanes = ahead_lanes - all_lanes<V>(1);
    x += logits.plane_stride;
    out += args.out.plane_stride;
  }
}

template <class T>
void backward_rows(const CrossEntropyGradient& args, int64_t begin, int64_t end) {
  using A = Opmath<T>;
  const Target<A> target(args.forward);
  const int64_t classes = args.forward.logits.columns;
  alignas(64) A buffer[kBlockCapacity];
  target.fill_constant(buffer);
  Sixteen rows;
  for (int64_t row = begin; row < end; row += rows.count) {
    rows = sixteen_rows(args.forward.logits, row, end);
    int64_t y[kLanes];
    if (!classes_of(target, rows, args.forward.first_bad, y)) return;
    if (args.forward.logits.in_planes()) {
      plane_rows<T>(args, target, rows, y, buffer);
      continue;
    }
    if (classes < kNarrow) {
      narrow_rows<T>(args, target, row, rows.count, y, buffer);
      continue;
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      if (y[i] == kIgnored) {
        std::memset(row_of<T>(args.out, row + i), 0, classes * sizeof(T));
      } else {
        wide_row<T>(args, target, row + i, y[i], buffer);
      }
    }
  }
}

}  // namespace

void cross_entropy_backward(const CrossEntropyGradient& args) {
  const Matrix& logits = args.forward.logits;
  on_floating(logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(logits.rows, row_grain(logits.columns),
                 [&](int64_t begin, int64_t end) { backward_rows<T>(args, begin, end); });
  });
}

}  // namespace ksam::KSAM_ISA
