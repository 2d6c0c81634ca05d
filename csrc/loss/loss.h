// Loss: the loss of every sample from its logits, and its gradient. The written contract is
// ksam_kernels/loss/reference.py.
//
// Arithmetic is float32, float64 for float64 logits: the opmath type A of the kernels.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tensor.h"

namespace ksam {

// A matrix whose elements lie side by side within a row; or one in planes, where the elements of a
// column lie side by side for all rows of a group. In [B, C, H, W], each pixel is a row with C
// columns, and the pixels of an image are a group.
struct Matrix {
  char* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;  // between rows, in elements; 0 where all are the same row
  DType dtype = DType::other;

  int64_t group = 0;  // rows of a group; 0 where there are no planes, and the next two are unused
  int64_t group_stride = 0;
  int64_t plane_stride = 0;

  KSAM_FORMULA bool in_planes() const { return group > 0; }
};

struct CrossEntropy {
  Matrix logits;       // [N, C] floating
  Matrix target;       // [N, 1] i32 or i64: classes; [N, C] floating: probabilities, in planes
                       // where the logits are, with groups as large as theirs
  const void* weight;  // [C] A, or null
  int64_t ignore_index;
  double label_smoothing;
  float* losses;       // [N]; the backward pass takes no losses
  void* stats;         // [N, 3] A: m = max x, log s with s = sum exp(x - m), mass = sum q; or null
  int64_t* first_bad;  // in: N; out: the first row whose class is out of range, if any is
};

struct CrossEntropyGradient {
  CrossEntropy forward;
  Matrix grad;  // [N, 1] f32
  Matrix out;   // [N, C] of the logits' dtype; in planes if they are, else contiguous
};

struct Elementwise {
  Matrix input;            // [B, n] floating, contiguous
  Matrix target;           // [B, n] floating, contiguous
  const void* pos_weight;  // [n] A, or null; binary cross-entropy only
  float* losses;           // [B]
};

struct ElementwiseGradient {
  Elementwise forward;
  Matrix grad;  // [B, 1] f32
  char* out;    // [B, n] of the input's dtype, contiguous
};

KSAM_DECLARE_PER_ISA(void cross_entropy(const CrossEntropy& args);
                     void cross_entropy_backward(const CrossEntropyGradient& args);
                     void binary_cross_entropy(const Elementwise& args);
                     void binary_cross_entropy_backward(const ElementwiseGradient& args);
                     void mse(const Elementwise& args);
                     void mse_backward(const ElementwiseGradient& args);)

// The same, in device memory. Probabilities have the dtype of the logits, and elementwise targets
// that of the input; both may be f32 instead, unless that dtype is f64. A class out of range fails
// a device-side assertion. *_scratch_bytes: how much scratch the function of that name takes.
KSAM_DECLARE_GPU(int64_t cross_entropy_scratch_bytes(const CrossEntropy& args);
                 void cross_entropy(const CrossEntropy& args, void* scratch, Stream stream);
                 void cross_entropy_backward(const CrossEntropyGradient& args, Stream stream);
                 // indices [k], those of topk_indices(losses, k); 1 <= k <= N < 2^32.
                 int64_t select_cross_entropy_scratch_bytes(const CrossEntropy& args);
                 void select_cross_entropy(const CrossEntropy& args, int64_t k, void* scratch,
                                           int64_t* indices, Stream stream);
                 int64_t elementwise_scratch_bytes(const Elementwise& args);
                 void binary_cross_entropy(const Elementwise& args, void* scratch, Stream stream);
                 void binary_cross_entropy_backward(const ElementwiseGradient& args, Stream stream);
                 void mse(const Elementwise& args, void* scratch, Stream stream);
                 void mse_backward(const ElementwiseGradient& args, Stream stream);)

}  // namespace ksam
