// Perturb: one global norm of gradients; weights that are backed up and moved uphill, then restored
// and updated.
//
// All lists of a call are walked together: operand i of a row is the i-th list's tensor of one
// parameter. Rows are cut into chunks, and one parallel region covers the chunks of all rows.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tensor.h"

namespace ksam {

// Elements that a thread of the CPU takes at once. Each chunk has a sum of squares of its own, so
// this also fixes the order in which a norm is added up.
constexpr int64_t kChunk = 4096;

// Whether a formula reads or writes an operand.
enum Access { kUntouched = 0, kRead = 1, kWrite = 2, kReadWrite = 3 };

struct Operand {
  char* data = nullptr;  // null where the row has no such operand
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // null where the row is walked in memory order
  int32_t ndim = 0;
  int32_t itemsize = 0;
  DType dtype = DType::f32;
};

template <int N>
struct Row {
  Operand operand[N];
  int64_t numel = 0;
  int64_t index = 0;  // in the lists, for values that differ between parameters
  bool wide = false;  // arithmetic in double
};

template <int N>
struct Rows {
  const Row<N>* row;           // [count]
  const int64_t* first_chunk;  // [count + 1]
  int64_t count;
  int64_t numel;
  bool streaming;  // operands that are only written bypass the caches
};

struct PerturbArgs {
  const double* norm;  // [1], where the tensors are
  const double* rho;   // one per parameter
  double eta;
  bool adaptive;
};

// What gradient scaling adds to an update: one number each, in the memory of the tensors' device.
struct Scaling {
  const float* grad_scale = nullptr;  // gradients are divided by it; null: they are not
  const float* found_inf = nullptr;   // where not 0, weights are restored and nothing else changes
};

// A learning rate: a number, or a place in the memory of the tensors' device, which a CUDA graph
// reads anew in every replay.
struct Rate {
  double number = 0;
  const float* stored = nullptr;  // where not null, used instead of the number
};

struct SgdArgs {
  Rate lr;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
  Scaling scaling;
};

struct AdamArgs {
  Rate lr;
  double beta1, beta2, eps, weight_decay;
  bool maximize, decoupled_weight_decay;
  Scaling scaling;
};

// The bias correction of Adam's moments for the step t that is being taken.
struct BiasCorrection {
  double step_size;        // lr / (1 - beta1^t)
  double root_correction;  // sqrt(1 - beta2^t)
};

KSAM_DECLARE_PER_ISA(
    // (grads, params) -> sum of squares; `partial` holds one sum per chunk.
    double sum_of_squares(const Rows<2>& rows, bool adaptive, double eta, double* partial);
    // (params, grads, backup)
    void perturb(const Rows<3>& rows, const PerturbArgs& args);
    // (params, backup)
    void restore(const Rows<2>& rows);
    // (params, backup, grads, momentum buffers). steps, one per parameter, is only read; null where
    // all momentum buffers have a history. found_inf is left for the caller to look at.
    void restore_sgd(const Rows<4>& rows, const SgdArgs& args, const float* const* steps);
    // (params, backup, grads, exp_avgs, exp_avg_sqs); one correction per parameter.
    void restore_adam(const Rows<5>& rows, const AdamArgs& args,
                      const BiasCorrection* corrections);)

constexpr int64_t kTicketBytes = sizeof(unsigned);  // scratch of an update that counts steps

KSAM_DECLARE_GPU(
    // Bytes of device memory that grad_norm needs.
    int64_t norm_scratch_bytes(const Rows<2>& rows);
    // (grads, params) -> norm [1], and as a double at the beginning of `scratch`.
    void grad_norm(const Rows<2>& rows, bool adaptive, double eta, void* scratch, float* norm,
                   Stream stream);
    // The others take the same rows in device memory.
    void perturb(const Rows<3>& rows, const PerturbArgs& args, Stream stream);
    void restore(const Rows<2>& rows, Stream stream);
    // These two look at found_inf themselves, and count the steps up.
    void restore_sgd(const Rows<4>& rows, const SgdArgs& args, float* const* steps, void* scratch,
                     Stream stream);
    void restore_adam(const Rows<5>& rows, const AdamArgs& args, float* const* steps, void* scratch,
                      Stream stream);)

}  // namespace ksam
