// Restore and update in one pass: the weights are read from the backup and written once.
#include "perturb/blocks_cpu.h"
#include "perturb/update.h"

namespace ksam::KSAM_ISA {
namespace {

// The gradient as the update takes it: unscaled, then turned uphill if maximized.
template <class V, class S>
KSAM_INLINE V gradient(V g, bool scaled, S scale, bool maximize) {
  if (scaled) g = g / scale;
  return maximize ? -g : g;
}

template <class A>
Sgd<A> sgd_of(const SgdArgs& args) {
  return {static_cast<A>(args.lr), static_cast<A>(args.momentum),
          static_cast<A>(1 - args.dampening), static_cast<A>(args.weight_decay), args.nesterov};
}

template <class A>
Adam<A> adam_of(const AdamArgs& args) {
  const double decay = args.decoupled_weight_decay ? 1 - args.lr * args.weight_decay
                                                   : args.weight_decay;
  return {static_cast<A>(args.beta1),
          static_cast<A>(1 - args.beta1),
          static_cast<A>(args.beta2),
          static_cast<A>(1 - args.beta2),
          static_cast<A>(args.eps),
          static_cast<A>(decay),
          args.weight_decay != 0,
          args.decoupled_weight_decay,
          args.beta1 > 0.5};
}

template <class A>
void sgd_block(const Sgd<A>& sgd, const SgdArgs& args, bool first, bool streaming,
               A* const (&p)[4], int count) {
  const A scale = static_cast<A>(args.grad_scale);
  const bool has_momentum = args.momentum != 0;
  for_each_vector<A>(count, streaming, [&](auto load, auto store, auto store_only) {
    const auto w = load(p[1]);
    const auto d = sgd.decayed(gradient(load(p[2]), args.scaled, scale, args.maximize), w);
    if (!has_momentum) {
      store_only(p[0], w - sgd.lr * d);
      return;
    }
    const auto v = first ? d : sgd.new_momentum(load(p[3]), d);
    store(p[3], v);
    store_only(p[0], sgd.updated(w, v, d));
  });
}

template <class A>
void adam_block(const Adam<A>& adam, const AdamArgs& args, A step_size, A root_correction,
                bool streaming, A* const (&p)[5], int count) {
  const A scale = static_cast<A>(args.grad_scale);
  for_each_vector<A>(count, streaming, [&](auto load, auto store, auto store_only) {
    auto w = load(p[1]);
    auto g = gradient(load(p[2]), args.scaled, scale, args.maximize);
    adam.decay(w, g);
    const auto m = adam.new_mean(load(p[3]), g);
    const auto v = adam.new_square(load(p[4]), g);
    store(p[3], m);
    store(p[4], v);
    store_only(p[0], adam.updated(w, m, square_root(v), step_size, root_correction));
  });
}

}  // namespace

// Bytes moved: 20 an element (read backup, g and v, write w and v), 12 without momentum.
void restore_sgd(const Rows<4>& rows, const SgdArgs& args) {
  constexpr Access kAccess[] = {kWrite, kRead, kRead, kReadWrite};
  for_each_chunk(rows, [&](const Row<4>& row, int64_t, int64_t begin, int64_t end) {
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const Sgd<A> sgd = sgd_of<A>(args);
      const bool first = args.first[row.index];
      for_each_block<A>(row, kAccess, begin, end, [&](A* const(&p)[4], int count) {
        sgd_block(sgd, args, first, may_stream(rows, row, p[0]), p, count);
      });
    });
  });
}

// Bytes moved: 28 an element (read backup, g, m and v, write w, m and v).
void restore_adam(const Rows<5>& rows, const AdamArgs& args) {
  constexpr Access kAccess[] = {kWrite, kRead, kRead, kReadWrite, kReadWrite};
  for_each_chunk(rows, [&](const Row<5>& row, int64_t, int64_t begin, int64_t end) {
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const Adam<A> adam = adam_of<A>(args);
      const A step_size = static_cast<A>(args.step_size[row.index]);
      const A root_correction = static_cast<A>(args.root_correction[row.index]);
      for_each_block<A>(row, kAccess, begin, end, [&](A* const(&p)[5], int count) {
        adam_block(adam, args, step_size, root_correction, may_stream(rows, row, p[0]), p, count);
      });
    });
  });
}

}  // namespace ksam::KSAM_ISA
