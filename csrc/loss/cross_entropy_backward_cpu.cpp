// Gradient of cross-entropy: dx_c = g (mass p_c - q_c) with p_c = exp(x_c - m - log s), from the
// statistics (m, log s, mass) of the forward pass; 0 in ignored rows.
//
// Bytes moved: each logit once, each element of the gradient once, and each probability where the
// target has them; per row a class, 4 for g and 12 for the statistics.
#include "loss/elementary_cpu.h"
#include "loss/target_cpu.h"

namespace ksam::KSAM_ISA {
namespace {

// Rows of fewer classes are narrow: they do not fill a vector.
constexpr int64_t kNarrow = kLanes;

// Numbers of one row, or of sixteen rows with a lane each.
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

// One row of at least kLanes classes.
template <class T, class A>
KSAM_INLINE void wide_row(const CrossEntropyGradient& args, const Target<A>& target, int64_t row,
                          int64_t y, A* room) {
  using V = Lanes<T>;
  const Slope<A> of_row = slope_of<A>(args, row);
  const Slope<V> slope = {all_lanes<V>(of_row.max), all_lanes<V>(of_row.log_s),
                          all_lanes<V>(of_row.mass), all_lanes<V>(of_row.grad)};
  const T* logits = row_of<T>(args.forward.logits, row);
  T* out = reinterpret_cast<T*>(args.out) + row * args.forward.logits.columns;
  for_each_block(args.forward.logits.columns, [&](int64_t begin, int64_t n) KSAM_INLINE_LAMBDA {
    const A* q = target.spread(row, begin, n, room);
    const bool has_class = target.has_hot() && y >= begin && y < begin + n;
    const A spread = has_class ? room[y - begin] : 0;
    if (has_class) room[y - begin] += target.hot(y);
    for_each_vector(n, [&](int64_t i) KSAM_INLINE_LAMBDA {
      const V x = load_lanes<V>(logits + begin + i);
      store_lanes(out + begin + i, slope.at(x, load_lanes<V>(q + i)));
    });
    if (has_class) room[y - begin] = spread;
  });
}

// Up to sixteen rows of fewer than kNarrow classes, a lane each. Lanes of ignored rows are 0.
template <class T, class A>
KSAM_INLINE void narrow_rows(const CrossEntropyGradient& args, const Target<A>& target,
                             int64_t begin, int64_t count, const int64_t* y, A* room) {
  using V = Lanes<T>;
  const int64_t classes = args.forward.logits.columns;
  Tile<T, kNarrow> x(classes);
  Tile<A, kNarrow> q(classes);
  A rows[4][kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (y[i] == kIgnored) continue;
    put_row(row_of<T>(args.forward.logits, begin + i), classes, i, &x);
    put_row(target.spread(begin + i, 0, classes, room), classes, i, &q);
    if (target.has_hot()) q.at[y[i]][i] += target.hot(y[i]);
    const Slope<A> row = slope_of<A>(args, begin + i);
    rows[0][i] = row.max;
    rows[1][i] = row.log_s;
    rows[2][i] = row.mass;
    rows[3][i] = row.grad;
  }
  const Slope<V> slope = {load_lanes<V>(rows[0]), load_lanes<V>(rows[1]), load_lanes<V>(rows[2]),
                          load_lanes<V>(rows[3])};
  for (int64_t c = 0; c < classes; ++c) {
    T* at = x.at[c];
    store_lanes(at, slope.at(load_lanes<V>(at), load_lanes<V>(q.at[c])));
  }
  for (int64_t i = 0; i < count; ++i) {
    take_row(x, classes, i, reinterpret_cast<T*>(args.out) + (begin + i) * classes);
  }
}

template <class T>
void backward_rows(const CrossEntropyGradient& args, int64_t begin, int64_t end) {
  using A = opmath_t<T>;
  const Target<A> target(args.forward);
  const int64_t classes = args.forward.logits.columns;
  alignas(64) A room[kBlockRoom];
  target.fill_constant(room, classes < kBlockRoom ? classes : kBlockRoom);
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = end - row < kLanes ? end - row : kLanes;
    int64_t y[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      y[i] = target.class_of(row + i);
      if (y[i] == kOutOfRange) return note_bad(row + i, args.forward.first_bad);
    }
    if (classes < kNarrow) {
      narrow_rows<T>(args, target, row, count, y, room);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (y[i] == kIgnored) {
        T* out = reinterpret_cast<T*>(args.out) + (row + i) * classes;
        std::memset(out, 0, classes * sizeof(T));
      } else {
        wide_row<T>(args, target, row + i, y[i], room);
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
