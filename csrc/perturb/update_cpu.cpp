// Restore and update in one pass: the weights are read from the backup and written once.
#include "perturb/blocks_cpu.h"
#include "perturb/update.h"

namespace ksam::KSAM_ISA {
namespace {

KSAM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
KSAM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// body(formula) with formula(g, w) the direction, free of choices: GCC makes no vectors of a loop
// that has too many, and a division where there is no scale would be dear.
template <class A, class Body>
KSAM_INLINE void on_direction(const Direction<A>& direction, const Body& body) {
  const A decay = direction.weight_decay, divisor = direction.divisor();
  if (divisor == 1 && decay == 0) return body([](A g, A) { return g; });
  if (divisor == 1) return body([decay](A g, A w) { return g + decay * w; });
  if (decay == 0) return body([divisor](A g, A) { return g / divisor; });
  body([decay, divisor](A g, A w) { return g / divisor + decay * w; });
}

// The formulas are taken by value: a loop that might write the numbers in them is no vector loop.
template <class A, class Formula>
KSAM_INLINE void sgd_block(Sgd<A> sgd, Formula direction, const A* w, const A* g, A* v, int n,
                           A* to) {
  if (v == nullptr) {
    KSAM_INDEPENDENT
    for (int j = 0; j < n; ++j) to[j] = w[j] - sgd.lr * direction(g[j], w[j]);
    return;
  }
  KSAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    const A d = direction(g[j], w[j]);
    const A momentum = sgd.new_momentum(v[j], d);
    v[j] = momentum;
    to[j] = sgd.updated(w[j], momentum, d);
  }
}

template <class A, class Formula>
KSAM_INLINE void adam_block(Adam<A> adam, Formula direction, const A* w, const A* g, A* m, A* v,
                            int n, A* to) {
  KSAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    const A d = direction(g[j], w[j]);
    const A mean = adam.new_mean(m[j], d), square = adam.new_square(v[j], d);
    m[j] = mean;
    v[j] = square;
    to[j] = adam.updated(w[j], mean, square_root(square));
  }
}

}  // namespace

// Bytes moved: 20 an element (read backup, g and v, write w and v), 12 without momentum.
void restore_sgd(const Rows<4>& rows, const SgdArgs& args, const float* const* steps) {
  constexpr Access kAccess[] = {kWrite, kRead, kRead, kReadWrite};
  for_each_chunk(rows, [&](const Row<4>& row, int64_t, int64_t begin, int64_t end) {
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const auto direction = direction_of<A>(args.scaling, args.weight_decay, args.maximize);
      const auto sgd = sgd_of<A>(args, steps != nullptr && *steps[row.index] == 0);
      on_direction(direction, [&](const auto& formula) {
        for_each_block<A>(row, kAccess, rows.streaming, begin, end, [&](A* const(&p)[4], int n) {
          sgd_block(sgd, formula, p[1], p[2], p[3], n, p[0]);
        });
      });
    });
  });
}

// Bytes moved: 28 an element (read backup, g, m and v, write w, m and v).
void restore_adam(const Rows<5>& rows, const AdamArgs& args, const BiasCorrection* corrections) {
  constexpr Access kAccess[] = {kWrite, kRead, kRead, kReadWrite, kReadWrite};
  for_each_chunk(rows, [&](const Row<5>& row, int64_t, int64_t begin, int64_t end) {
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const auto direction = direction_of<A>(args.scaling, l2_of(args), args.maximize);
      const auto adam = adam_of<A>(args, corrections[row.index]);
      on_direction(direction, [&](const auto& formula) {
        for_each_block<A>(row, kAccess, rows.streaming, begin, end, [&](A* const(&p)[5], int n) {
          adam_block(adam, formula, p[1], p[2], p[3], p[4], n, p[0]);
        });
      });
    });
  });
}

}  // namespace ksam::KSAM_ISA
