// Perturb: one global norm, weights moved uphill with a backup, brought back, updated.
//
// All lists of a call are walked together: operand i of a row is the i-th list's tensor of one
// parameter. Rows are cut into chunks, and one parallel region covers the chunks of all rows.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tensor.h"

namespace ksam {

constexpr int64_t kChunk = 4096;  // elements; also the unit of the norm's fixed order of addition

// Whether a formula reads or writes an operand.
enum Access { kUntouched = 0, kRead = 1, kWrite = 2, kReadWrite = 3 };

struct Operand {
  char* data = nullptr;  // null: this row has no such operand
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // null: the row is walked in memory order
  int32_t ndim = 0;
  int32_t itemsize = 0;
  DType dtype = DType::f32;
};

template <int N>
struct Row {
  Operand operand[N];
  int64_t numel = 0;
  int64_t index = 0;  // in the lists, for values that each parameter has of its own
  bool wide = false;  // arithmetic in double
};

template <int N>
struct Rows {
  const Row<N>* rows;
  const int64_t* first_chunk;  // [count + 1]
  int64_t count;
  int64_t numel;
  bool streaming;  // what is only written goes past the caches
};

struct PerturbArgs {
  double norm;
  const double* rho;  // one per parameter
  double eta;
  bool adaptive;
  bool moves;  // else the weights keep their bits
};

struct SgdArgs {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool scaled;  // gradients are divided by grad_scale
  float grad_scale;
  const bool* first;  // one per parameter: no momentum yet
};

struct AdamArgs {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, decoupled_weight_decay;
  bool scaled;
  float grad_scale;
  const double* step_size;        // lr / (1 - beta1^t), one per parameter
  const double* root_correction;  // sqrt(1 - beta2^t), one per parameter
};

KSAM_DECLARE_PER_ISA(
    // (grads, params) -> sum of squares; `partial` has room for one sum per chunk.
    double sum_of_squares(const Rows<2>& rows, bool adaptive, double eta, double* partial);
    // (params, grads, backup)
    void perturb(const Rows<3>& rows, const PerturbArgs& args);
    // (params, backup)
    void restore(const Rows<2>& rows);
    // (params, backup, grads, momentum buffers)
    void restore_sgd(const Rows<4>& rows, const SgdArgs& args);
    // (params, backup, grads, exp_avgs, exp_avg_sqs)
    void restore_adam(const Rows<5>& rows, const AdamArgs& args);)

}  // namespace ksam
