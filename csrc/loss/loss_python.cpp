#include <cstdlib>
#include <memory>
#include <string>

#include "common/python.h"
#include "loss/loss.h"
#include "rooms.h"
#include "topk/topk.h"

namespace py = pybind11;

namespace ksam {
namespace {

DType opmath_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

bool is_index(DType dtype) { return dtype == DType::i32 || dtype == DType::i64; }

// A contiguous tensor on the CPU of a dtype and a number of elements.
bool is_plain(const Tensor& t, DType dtype, int64_t numel) {
  return on_cpu(t) && t.dtype == dtype && t.numel == numel && is_contiguous(t);
}

// The first `ndim` dimensions as one, of stride `stride`; false where they have no common stride.
bool flatten(const Tensor& t, int ndim, int64_t* size, int64_t* stride) {
  *size = 1;
  *stride = 0;
  bool regular = true;
  for (int i = ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    if (*size == 1) *stride = t.strides[i];
    regular = regular && t.strides[i] == *stride * *size;
    *size *= t.shape[i];
  }
  return regular || *size == 0;
}

// [..., columns] as rows that have unit stride inside.
bool read_rows(py::handle object, Tensor* t, Matrix* rows) {
  if (!read_tensor(object, t) || !on_cpu(*t) || t->ndim < 1) return false;
  const int last = t->ndim - 1;
  rows->data = t->data;
  rows->dtype = t->dtype;
  rows->columns = t->shape[last];
  if (rows->columns < 1) return false;
  // torch takes any strides for contiguous where there are no elements, and rearranges nothing.
  if (rows->columns > 1 && t->strides[last] != 1 && t->numel > 0) return false;
  return flatten(*t, last, &rows->rows, &rows->stride);
}

// [...] as rows of one element, any stride between them.
bool read_column(py::handle object, Matrix* rows) {
  Tensor t;
  if (!read_tensor(object, &t) || !on_cpu(t)) return false;
  rows->data = t.data;
  rows->dtype = t.dtype;
  rows->columns = 1;
  return flatten(t, t.ndim, &rows->rows, &rows->stride);
}

// Classes [...] or probabilities [..., C] for logits [..., C].
bool read_target(py::handle object, const Tensor& logits, Matrix* target) {
  Tensor t;
  if (!read_tensor(object, &t)) return false;
  if (is_index(t.dtype)) {
    if (t.ndim != logits.ndim - 1 || !read_column(object, target)) return false;
    for (int i = 0; i < t.ndim; ++i) {
      if (t.shape[i] != logits.shape[i]) return false;
    }
    return true;
  }
  return is_floating(t.dtype) && same_shape(t, logits) && read_rows(object, &t, target);
}

bool read_weight(py::handle object, DType dtype, int64_t numel, const void** weight) {
  Tensor t;
  if (!read_optional(object, &t)) return false;
  *weight = t.data;
  return object.is_none() || is_plain(t, dtype, numel);
}

// All but the outputs.
bool read_cross_entropy(py::handle logits_, py::handle target, py::handle weight,
                        int64_t ignore_index, double label_smoothing, CrossEntropy* args) {
  Tensor logits;
  if (!read_rows(logits_, &logits, &args->logits) || !is_floating(logits.dtype)) return false;
  if (!read_target(target, logits, &args->target)) return false;
  const int64_t classes = args->logits.columns;
  Tensor w;
  if (!read_optional(weight, &w) || (w.data != nullptr && w.ndim != 1)) return false;
  if (!read_weight(weight, opmath_of(logits.dtype), classes, &args->weight)) return false;
  args->ignore_index = ignore_index;
  args->label_smoothing = label_smoothing;
  return true;
}

bool read_losses(py::handle losses_, py::handle stats_, CrossEntropy* args) {
  Tensor losses, stats;
  const Matrix& logits = args->logits;
  if (!read_tensor(losses_, &losses) || !read_optional(stats_, &stats)) return false;
  if (!is_plain(losses, DType::f32, logits.rows)) return false;
  if (!stats_.is_none() && !is_plain(stats, opmath_of(logits.dtype), 3 * logits.rows)) return false;
  args->losses = losses.as<float>();
  args->stats = stats.data;
  return true;
}

[[noreturn]] void throw_out_of_range(const CrossEntropy& args, int64_t row) {
  const Matrix& t = args.target;
  const int64_t at = row * t.stride;
  const int64_t y = t.dtype == DType::i64 ? reinterpret_cast<const int64_t*>(t.data)[at]
                                          : reinterpret_cast<const int32_t*>(t.data)[at];
  throw py::index_error("target holds class " + std::to_string(y) + ", out of range for " +
                        std::to_string(args.logits.columns) + " classes");
}

// Runs body(args) without the interpreter's lock, and raises for a class that it found bad.
template <class Body>
void run(CrossEntropy* args, const Body& body) {
  int64_t first_bad = args->logits.rows;
  args->first_bad = &first_bad;
  {
    py::gil_scoped_release release;
    body();
  }
  if (first_bad < args->logits.rows) throw_out_of_range(*args, first_bad);
}

// logits [..., C] floating, any stride between rows; target [...] or [..., C]; weight [C] A or
// None; losses [...] f32, and stats [..., 3] A or None where no gradient will follow, contiguous.
// A is f64 for f64 logits, else f32.
bool cross_entropy(py::handle logits, py::handle target, py::handle weight, int64_t ignore_index,
                   double label_smoothing, py::handle losses, py::handle stats) {
  CrossEntropy args;
  if (!read_cross_entropy(logits, target, weight, ignore_index, label_smoothing, &args) ||
      !read_losses(losses, stats, &args)) {
    return false;
  }
  run(&args, [&] { KSAM_ON_ISA(cross_entropy, args); });
  return true;
}

// The same, and indices [k] int64 of the k largest losses.
bool select_cross_entropy(py::handle logits, py::handle target, py::handle weight,
                          int64_t ignore_index, double label_smoothing, py::handle losses_,
                          py::handle stats, py::handle indices_) {
  CrossEntropy args;
  Tensor losses, indices;
  if (!read_cross_entropy(logits, target, weight, ignore_index, label_smoothing, &args) ||
      !read_losses(losses_, stats, &args) || !read_tensor(losses_, &losses) ||
      !read_tensor(indices_, &indices)) {
    return false;
  }
  const int64_t k = indices.numel;
  if (k < 1 || k > losses.numel || !is_plain(indices, DType::i64, k)) return false;
  run(&args, [&] {
    const int64_t bytes = topk_scratch_bytes(losses.dtype, losses.numel);
    const std::unique_ptr<char[]> scratch(new char[bytes]);
    KSAM_ON_ISA(cross_entropy, args);
    if (*args.first_bad == losses.numel) {
      KSAM_ON_ISA(topk_indices, losses, k, scratch.get(), indices.as<int64_t>());
    }
  });
  return true;
}

// grad [...] f32, any stride; stats of the forward pass; out [..., C] of the logits' dtype,
// contiguous.
bool cross_entropy_backward(py::handle grad, py::handle logits, py::handle target,
                            py::handle stats_, py::handle weight, int64_t ignore_index,
                            double label_smoothing, py::handle out_) {
  CrossEntropyGradient args;
  CrossEntropy& forward = args.forward;
  Tensor stats, out;
  if (!read_cross_entropy(logits, target, weight, ignore_index, label_smoothing, &forward) ||
      !read_column(grad, &args.grad) || !read_tensor(stats_, &stats) || !read_tensor(out_, &out)) {
    return false;
  }
  const Matrix& x = forward.logits;
  if (args.grad.rows != x.rows || args.grad.dtype != DType::f32) return false;
  if (!is_plain(stats, opmath_of(x.dtype), 3 * x.rows)) return false;
  if (!is_plain(out, x.dtype, x.rows * x.columns)) return false;
  forward.stats = stats.data;
  args.out = out.data;
  run(&forward, [&] { KSAM_ON_ISA(cross_entropy_backward, args); });
  return true;
}

// A contiguous tensor [B, ...] as B rows.
bool read_samples(py::handle object, Tensor* t, Matrix* samples) {
  if (!read_tensor(object, t) || !on_cpu(*t) || !is_floating(t->dtype)) return false;
  if (t->ndim < 1 || !is_contiguous(*t)) return false;
  samples->data = t->data;
  samples->dtype = t->dtype;
  samples->rows = t->shape[0];
  samples->columns = 1;
  for (int i = 1; i < t->ndim; ++i) samples->columns *= t->shape[i];
  samples->stride = samples->columns;
  return samples->columns > 0 || samples->rows == 0;
}

// All but the losses.
bool read_elementwise(py::handle input_, py::handle target_, py::handle pos_weight,
                      Elementwise* args) {
  Tensor input, target;
  if (!read_samples(input_, &input, &args->input)) return false;
  if (!read_samples(target_, &target, &args->target) || !same_shape(input, target)) return false;
  return read_weight(pos_weight, opmath_of(input.dtype), args->input.columns, &args->pos_weight);
}

template <class Kernel>
bool elementwise(py::handle input, py::handle target, py::handle pos_weight, py::handle losses_,
                 const Kernel& kernel) {
  Elementwise args;
  Tensor losses;
  if (!read_elementwise(input, target, pos_weight, &args)) return false;
  if (!read_tensor(losses_, &losses) || !is_plain(losses, DType::f32, args.input.rows)) {
    return false;
  }
  args.losses = losses.as<float>();
  py::gil_scoped_release release;
  kernel(args);
  return true;
}

template <class Kernel>
bool elementwise_backward(py::handle grad, py::handle input, py::handle target,
                          py::handle pos_weight, py::handle out_, const Kernel& kernel) {
  ElementwiseGradient args;
  Tensor out;
  const Matrix& x = args.forward.input;
  if (!read_elementwise(input, target, pos_weight, &args.forward)) return false;
  if (!read_column(grad, &args.grad) || !read_tensor(out_, &out)) return false;
  if (args.grad.rows != x.rows || args.grad.dtype != DType::f32) return false;
  if (!is_plain(out, x.dtype, x.rows * x.columns)) return false;
  args.out = out.data;
  py::gil_scoped_release release;
  kernel(args);
  return true;
}

// input and target [B, ...] floating, contiguous; pos_weight [n] A or None, n elements a sample;
// losses [B] f32; grad [B] f32, any stride; out [B, ...] of the input's dtype.
bool binary_cross_entropy(py::handle input, py::handle target, py::handle pos_weight,
                          py::handle losses) {
  return elementwise(input, target, pos_weight, losses, [](const Elementwise& args) {
    KSAM_ON_ISA(binary_cross_entropy, args);
  });
}

bool binary_cross_entropy_backward(py::handle grad, py::handle input, py::handle target,
                                   py::handle pos_weight, py::handle out) {
  return elementwise_backward(
      grad, input, target, pos_weight, out,
      [](const ElementwiseGradient& args) { KSAM_ON_ISA(binary_cross_entropy_backward, args); });
}

bool mse(py::handle input, py::handle target, py::handle losses) {
  return elementwise(input, target, py::none(), losses,
                     [](const Elementwise& args) { KSAM_ON_ISA(mse, args); });
}

bool mse_backward(py::handle grad, py::handle input, py::handle target, py::handle out) {
  return elementwise_backward(
      grad, input, target, py::none(), out,
      [](const ElementwiseGradient& args) { KSAM_ON_ISA(mse_backward, args); });
}

}  // namespace

void bind_loss(py::module_& m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("select_cross_entropy", &select_cross_entropy);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.def("binary_cross_entropy_with_logits", &binary_cross_entropy);
  m.def("binary_cross_entropy_with_logits_backward", &binary_cross_entropy_backward);
  m.def("mse", &mse);
  m.def("mse_backward", &mse_backward);
}

}  // namespace ksam
