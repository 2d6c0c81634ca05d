// Restore and update in one pass: the weights are read from the backup and written once.
//
// The contract is exact, bit for bit: setup.py compiles this folder with -fmad=false, so that no
// product is contracted with a sum. Division and square root are IEEE's, nvcc's default.
#include "perturb/elements.cuh"
#include "perturb/update.h"

namespace ksam::gpu {
namespace {

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// What both updates have in common: all but their arithmetic. The value of a row is a pointer to
// its step count, null where the call counts no steps because all momentum buffers have a history.
template <class Hyperparameters>
struct Update {
  static constexpr int kFrom = 1, kTo = 0;  // where found_inf is not 0, weights are just restored
  static constexpr bool kCopies = false;
  static constexpr int kVectors = 2;
  using Value = float*;

  struct Args {
    Hyperparameters options;
    unsigned* ticket;  // null where no steps are counted
  };

  static __device__ __forceinline__ bool acts(const Args& args, const float*) {
    const float* found_inf = args.options.scaling.found_inf;
    return found_inf == nullptr || *found_inf == 0;
  }

  // The last block counts up the steps of the launch's rows: all blocks have read them by then.
  template <class Table>
  static __device__ __forceinline__ void finish(const Args& args, const Table& table) {
    if (args.ticket == nullptr || !last_block(args.ticket, gridDim.x)) return;
    for (int r = threadIdx.x; r < table.rows; r += kThreads) *table.value_of(r) += 1;
  }
};

// The operands are (params, backup, grads) and, with momentum, momentum buffers.
template <bool kMomentum>
struct SgdUpdate : Update<SgdArgs> {
  static constexpr int kOperands = kMomentum ? 4 : 3;
  static constexpr unsigned kReads = kMomentum ? 0b1110 : 0b0110;
  static constexpr unsigned kWrites = kMomentum ? 0b1001 : 0b0001;

  template <class A>
  struct Element {
    Direction<A> direction;
    Sgd<A> sgd;

    __device__ __forceinline__ void operator()(A (&x)[kOperands]) const {
      const A w = x[1], d = direction(x[2], w, direction.decays());
      if constexpr (kMomentum) {
        x[3] = sgd.new_momentum(x[3], d);
        x[0] = sgd.updated(w, x[3], d);
      } else {
        x[0] = w - sgd.lr * d;
      }
    }
  };

  template <class A>
  static __device__ __forceinline__ Element<A> element(const Args& args, const float* step) {
    const SgdArgs& options = args.options;
    return {direction_of<A>(options.scaling, options.weight_decay, options.maximize),
            sgd_of<A>(options, step != nullptr && *step == 0)};
  }
};

// The operands are (params, backup, grads, exp_avgs, exp_avg_sqs).
struct AdamUpdate : Update<AdamArgs> {
  static constexpr int kOperands = 5;
  static constexpr unsigned kReads = 0b11110, kWrites = 0b11001;

  template <class A>
  struct Element {
    Direction<A> direction;
    Adam<A> adam;

    __device__ __forceinline__ void operator()(A (&x)[kOperands]) const {
      const A w = x[1], d = direction(x[2], w, direction.decays());
      x[3] = adam.new_mean(x[3], d);
      x[4] = adam.new_square(x[4], d);
      x[0] = adam.updated(w, x[3], square_root(x[4]));
    }
  };

  template <class A>
  static __device__ __forceinline__ Element<A> element(const Args& args, const float* step) {
    const AdamArgs& options = args.options;
    const double t = double{*step} + 1;
    const BiasCorrection correction{value_of(options.lr) / (1 - pow(options.beta1, t)),
                                    sqrt(1 - pow(options.beta2, t))};
    return {direction_of<A>(options.scaling, l2_of(options), options.maximize),
            adam_of<A>(options, correction)};
  }
};

// Launches: 1 for each dtype, if no row is strided or of several dtypes and the rows fit a table.
template <class Formula, int N, class Hyperparameters>
void launch_update(const Rows<N>& rows, const Hyperparameters& options, float* const* steps,
                   void* scratch, Stream stream) {
  const typename Formula::Args args{options, steps == nullptr ? nullptr : ticket(stream, scratch)};
  const auto step_of = [&](const Row<N>& row) {
    return steps == nullptr ? nullptr : steps[row.index];
  };
  apply_to_rows<Formula>(rows, args, step_of, stream);
}

}  // namespace

// Bytes moved: 20 an element (read backup, g and v, write w and v), 12 without momentum.
void restore_sgd(const Rows<4>& rows, const SgdArgs& args, float* const* steps, void* scratch,
                 Stream stream) {
  const auto run = args.momentum == 0 ? launch_update<SgdUpdate<false>, 4, SgdArgs>
                                      : launch_update<SgdUpdate<true>, 4, SgdArgs>;
  run(rows, args, steps, scratch, stream);
}

// Bytes moved: 28 an element (read backup, g, m and v, write w, m and v).
void restore_adam(const Rows<5>& rows, const AdamArgs& args, float* const* steps, void* scratch,
                  Stream stream) {
  launch_update<AdamUpdate>(rows, args, steps, scratch, stream);
}

}  // namespace ksam::gpu
