// Restore and update in one pass: the weights are read from the backup and written once.
#include "perturb/blocks_cpu.h"
#include "perturb/update.h"

namespace ksam::KSAM_ISA {
namespace {

// The operands of an update are the weights, their backup, the gradient, and the optimizer's state.
template <class A, bool kMomentum>
struct SgdUpdate {
  static constexpr Access kAccess[] = {kWrite, kRead, kRead, kMomentum ? kReadWrite : kUntouched};
  Direction<A> direction;
  bool decays;
  Sgd<A> sgd;

  template <class V>
  KSAM_INLINE void operator()(V (&x)[4]) const {
    const V d = direction(x[2], x[1], decays);
    if constexpr (kMomentum) {
      x[3] = sgd.new_momentum(x[3], d);
      x[0] = sgd.updated(x[1], x[3], d);
    } else {
      x[0] = x[1] - sgd.lr * d;
    }
  }
};

template <class A>
struct AdamUpdate {
  static constexpr Access kAccess[] = {kWrite, kRead, kRead, kReadWrite, kReadWrite};
  Direction<A> direction;
  bool decays;
  Adam<A> adam;

  template <class V>
  KSAM_INLINE void operator()(V (&x)[5]) const {
    const V d = direction(x[2], x[1], decays);
    x[3] = adam.new_mean(x[3], d);
    x[4] = adam.new_square(x[4], d);
    x[0] = adam.updated(x[1], x[3], square_root(x[4]));
  }
};

}  // namespace

// Bytes moved: 20 an element (read backup, g and v, write w and v), 12 without momentum.
void restore_sgd(const Rows<4>& rows, const SgdArgs& args, const float* const* steps) {
  for_each_chunk(rows, [&](const Row<4>& row, int64_t, int64_t begin, int64_t end) {
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const auto direction = direction_of<A>(args.scaling, args.weight_decay, args.maximize);
      const auto sgd = sgd_of<A>(args, steps != nullptr && *steps[row.index] == 0);
      const bool decays = direction.decays();
      if (row.operand[3].data == nullptr) {
        transform<A>(row, rows.streaming, begin, end, SgdUpdate<A, false>{direction, decays, sgd});
      } else {
        transform<A>(row, rows.streaming, begin, end, SgdUpdate<A, true>{direction, decays, sgd});
      }
    });
  });
}

// Bytes moved: 28 an element (read backup, g, m and v, write w, m and v).
void restore_adam(const Rows<5>& rows, const AdamArgs& args, const BiasCorrection* corrections) {
  for_each_chunk(rows, [&](const Row<5>& row, int64_t, int64_t begin, int64_t end) {
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const auto direction = direction_of<A>(args.scaling, l2_of(args), args.maximize);
      const auto adam = adam_of<A>(args, corrections[row.index]);
      const AdamUpdate<A> update{direction, direction.decays(), adam};
      transform<A>(row, rows.streaming, begin, end, update);
    });
  });
}

}  // namespace ksam::KSAM_ISA
