// Restore and update in one pass: the weights are read from the backup and written once.
#include "perturb/blocks_cpu.h"
#include "perturb/update.h"

namespace ksam::KSAM_ISA {
namespace {

KSAM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
KSAM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// The direction of every element: the gradient itself where nothing changes it, else in `buffer`.
template <class A>
const A* direct(const Direction<A>& direction, const A* g, const A* w, int n, A* buffer) {
  if (direction.is_gradient()) return g;
  KSAM_INDEPENDENT
  for (int j = 0; j < n; ++j) buffer[j] = direction(g[j], w[j]);
  return buffer;
}

template <class A>
void sgd_block(const Sgd<A>& sgd, const A* w, const A* d, A* v, int n, A* to) {
  if (v == nullptr) {
    KSAM_INDEPENDENT
    for (int j = 0; j < n; ++j) to[j] = w[j] - sgd.lr * d[j];
    return;
  }
  KSAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    const A momentum = sgd.new_momentum(v[j], d[j]);
    v[j] = momentum;
    to[j] = sgd.updated(w[j], momentum, d[j]);
  }
}

template <class A>
void adam_block(const Adam<A>& adam, const A* w, const A* g, A* m, A* v, int n, A* to) {
  KSAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    const A mean = adam.new_mean(m[j], g[j]), square = adam.new_square(v[j], g[j]);
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
      alignas(64) A buffer[kBlock];
      for_each_block<A>(row, kAccess, rows.streaming, begin, end, [&](A* const(&p)[4], int n) {
        sgd_block(sgd, p[1], direct(direction, p[2], p[1], n, buffer), p[3], n, p[0]);
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
      alignas(64) A buffer[kBlock];
      for_each_block<A>(row, kAccess, rows.streaming, begin, end, [&](A* const(&p)[5], int n) {
        adam_block(adam, p[1], direct(direction, p[2], p[1], n, buffer), p[3], p[4], n, p[0]);
      });
    });
  });
}

}  // namespace ksam::KSAM_ISA
