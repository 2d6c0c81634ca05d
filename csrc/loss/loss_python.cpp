// Reads the arguments of a call, checks them, allocates what it returns, and runs it on the
// tensors' device.
#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/python.h"
#include "loss/loss.h"
#include "loss/matrix.h"
#include "topk/topk.h"

namespace py = pybind11;

namespace ksam {
namespace {

DType opmath_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

bool is_index(DType dtype) { return dtype == DType::i32 || dtype == DType::i64; }

// Whether t is contiguous, on the device of `like`, and of this dtype and number of elements.
bool is_plain(const Tensor& t, const Tensor& like, DType dtype, int64_t numel) {
  return same_device(t, like) && t.dtype == dtype && t.numel == numel && is_contiguous(t);
}

// Whether kernels take a floating target of this dtype: CPU kernels take any, GPU kernels the
// input's own and that of the arithmetic.
bool takes_target(DType dtype, const Tensor& input) {
  return on_cpu(input) || dtype == input.dtype || dtype == opmath_of(input.dtype);
}

// Reads classes [...] or probabilities [..., C] for logits [..., C], which lie as `layout` says.
bool read_target(py::handle object, const Tensor& logits, const Matrix& layout, Matrix* target) {
  Tensor t;
  if (!read_tensor(object, &t) || !same_device(t, logits)) return false;
  if (is_index(t.dtype)) {
    if (t.ndim != logits.ndim - 1 || !as_column(t, target)) return false;
    for (int i = 0; i < t.ndim; ++i) {
      if (t.shape[i] != logits.shape[i]) return false;
    }
    return true;
  }
  if (!is_floating(t.dtype) || !takes_target(t.dtype, logits)) return false;
  return same_shape(t, logits) && as_matrix(t, target) && target->group == layout.group;
}

// Reads None or `numel` weights, of the dtype of the arithmetic on `like`.
bool read_weight(py::handle object, const Tensor& like, int64_t numel, Tensor* t,
                 const void** weight) {
  if (!read_optional(object, t)) return false;
  *weight = t->data;
  return object.is_none() ||
         (is_plain(*t, like, opmath_of(like.dtype), numel) && !is_negative(object));
}

// Reads the upstream gradient [...], one element for each of `rows` rows.
bool read_upstream(py::handle object, const Tensor& input, int64_t rows, Matrix* grad) {
  Tensor t;
  return read_tensor(object, &t) && same_device(t, input) && !is_negative(object) &&
         as_column(t, grad) && grad->rows == rows && grad->dtype == DType::f32;
}

// Contiguous memory for the gradient of t.
NewTensor new_like(py::handle object, const Tensor& t) {
  return new_empty(object, t, t.dtype, std::vector<int64_t>(t.shape, t.shape + t.ndim));
}

// Reads a call's options, which may be anything: kernels are tried before public functions check.
bool read_options(py::handle ignore_index, py::handle label_smoothing, CrossEntropy* args) {
  if (!read_int(ignore_index, &args->ignore_index)) return false;
  if (!read_number(label_smoothing, &args->label_smoothing)) return false;
  if (args->ignore_index >= 0 && is_floating(args->target.dtype)) return false;
  return 0 <= args->label_smoothing && args->label_smoothing <= 1;
}

// Reads all arguments but the outputs.
bool read_cross_entropy(py::handle object, py::handle target, py::handle weight,
                        py::handle ignore_index, py::handle label_smoothing, Tensor* logits,
                        CrossEntropy* args) {
  if (!read_tensor(object, logits) || !is_floating(logits->dtype)) return false;
  if (!as_matrix(*logits, &args->logits)) return false;
  if (!read_target(target, *logits, args->logits, &args->target)) return false;
  if (is_negative(object) || is_negative(target)) return false;
  Tensor w;
  if (!read_weight(weight, *logits, args->logits.columns, &w, &args->weight)) return false;
  return (args->weight == nullptr || w.ndim == 1) &&
         read_options(ignore_index, label_smoothing, args);
}

// The tensors that a forward pass writes and returns.
struct Outputs {
  NewTensor losses, stats;

  // Allocates them; false where a mode of torch makes no plain tensors.
  bool make(py::handle logits, const Tensor& x, bool with_stats, CrossEntropy* args) {
    std::vector<int64_t> sizes(x.shape, x.shape + x.ndim - 1);
    losses = new_empty(logits, x, DType::f32, sizes);
    if (!losses.object) return false;
    args->losses = losses.view.as<float>();
    args->stats = nullptr;
    stats.object = py::none();
    if (!with_stats) return true;
    sizes.push_back(3);
    stats = new_empty(logits, x, opmath_of(x.dtype), sizes);
    args->stats = stats.view.data;
    return static_cast<bool>(stats.object);
  }
};

[[noreturn]] void throw_out_of_range(const CrossEntropy& args, int64_t row) {
  const Matrix& t = args.target;
  const int64_t at = row * t.stride;
  const int64_t y = t.dtype == DType::i64 ? reinterpret_cast<const int64_t*>(t.data)[at]
                                          : reinterpret_cast<const int32_t*>(t.data)[at];
  throw py::index_error("target holds class " + std::to_string(y) + ", out of range for " +
                        std::to_string(args.logits.columns) + " classes");
}

// Runs body() without the interpreter's lock. Raises if body() finds a class out of range.
template <class Body>
void run_on_cpu(CrossEntropy* args, const Body& body) {
  int64_t first_bad = args->logits.rows;
  args->first_bad = &first_bad;
  {
    py::gil_scoped_release release;
    body();
  }
  if (first_bad < args->logits.rows) throw_out_of_range(*args, first_bad);
}

// logits [..., C] floating, any stride between rows; target [...] or [..., C]; weight [C] A or
// None. Returns (losses [...] f32, stats [..., 3] A or, without with_stats, None); or None. A is
// f64 for f64 logits, else f32.
py::object cross_entropy(py::handle logits, py::handle target, py::handle weight,
                         py::handle ignore_index, py::handle label_smoothing, bool with_stats) {
  CrossEntropy args;
  Tensor x;
  Outputs out;
  if (!read_cross_entropy(logits, target, weight, ignore_index, label_smoothing, &x, &args) ||
      !out.make(logits, x, with_stats, &args)) {
    return py::none();
  }
  if (on_gpu(x)) {
    GpuCall call(x);
    py::gil_scoped_release release;
    void* scratch = call.scratch(KSAM_ON_GPU(cross_entropy_scratch_bytes, args));
    KSAM_ON_GPU(cross_entropy, args, scratch, call.stream());
  } else {
    run_on_cpu(&args, [&] { KSAM_ON_ISA(cross_entropy, args); });
  }
  return py::make_tuple(out.losses.object, out.stats.object);
}

void select_on_gpu(const Tensor& logits, const CrossEntropy& args, const Tensor& indices) {
  GpuCall call(logits);
  py::gil_scoped_release release;
  void* scratch = call.scratch(KSAM_ON_GPU(select_cross_entropy_scratch_bytes, args));
  KSAM_ON_GPU(select_cross_entropy, args, indices.numel, scratch, indices.as<int64_t>(),
              call.stream());
}

void select_on_cpu(const Tensor& losses, CrossEntropy* args, const Tensor& indices) {
  run_on_cpu(args, [&] {
    const int64_t bytes = topk_scratch_bytes(losses.dtype, losses.numel);
    const std::unique_ptr<char[]> scratch(new char[bytes]);
    KSAM_ON_ISA(cross_entropy, *args);
    if (*args->first_bad == losses.numel) {
      KSAM_ON_ISA(topk_indices, losses, indices.numel, scratch.get(), indices.as<int64_t>());
    }
  });
}

// The same for logits [B, C]; also returns indices [k] int64 of the k largest losses; 1 <= k <= B.
py::object select_cross_entropy(py::handle logits, py::handle target, py::handle k_,
                                py::handle weight, py::handle ignore_index,
                                py::handle label_smoothing, bool with_stats) {
  CrossEntropy args;
  Tensor x;
  Outputs out;
  int64_t k;
  if (!read_cross_entropy(logits, target, weight, ignore_index, label_smoothing, &x, &args) ||
      x.ndim != 2 || !read_int(k_, &k)) {
    return py::none();
  }
  const int64_t samples = args.logits.rows;
  if (k < 1 || k > samples || samples >> 32 != 0) return py::none();
  const NewTensor indices = new_empty(logits, x, DType::i64, {k});
  if (!indices.object || !out.make(logits, x, with_stats, &args)) return py::none();
  on_gpu(x) ? select_on_gpu(x, args, indices.view)
            : select_on_cpu(out.losses.view, &args, indices.view);
  return py::make_tuple(out.losses.object, out.stats.object, indices.object);
}

// grad [...] f32, any stride; stats of the forward pass. Returns the gradient [..., C] of the
// logits' dtype, or None.
py::object cross_entropy_backward(py::handle grad, py::handle logits, py::handle target,
                                  py::handle stats_, py::handle weight, py::handle ignore_index,
                                  py::handle label_smoothing) {
  CrossEntropyGradient args;
  CrossEntropy& forward = args.forward;
  Tensor x, stats;
  if (!read_cross_entropy(logits, target, weight, ignore_index, label_smoothing, &x, &forward) ||
      !read_tensor(stats_, &stats)) {
    return py::none();
  }
  if (!is_plain(stats, x, opmath_of(x.dtype), 3 * forward.logits.rows)) return py::none();
  forward.stats = stats.data;
  if (!read_upstream(grad, x, forward.logits.rows, &args.grad)) return py::none();
  const bool in_planes = forward.logits.in_planes();
  const NewTensor out = in_planes ? empty_like(logits) : new_like(logits, x);
  if (!out.object || !as_matrix(out.view, &args.out)) return py::none();
  if (args.out.group != forward.logits.group) return py::none();
  if (on_gpu(x)) {
    GpuCall call(x);
    py::gil_scoped_release release;
    KSAM_ON_GPU(cross_entropy_backward, args, call.stream());
  } else {
    run_on_cpu(&forward, [&] { KSAM_ON_ISA(cross_entropy_backward, args); });
  }
  return out.object;
}

// Reads a contiguous tensor [B, ...] as B rows.
bool read_samples(py::handle object, Tensor* t, Matrix* samples) {
  if (!read_tensor(object, t) || !has_kernels(*t) || !is_floating(t->dtype)) return false;
  if (t->ndim < 1 || !is_contiguous(*t)) return false;
  samples->data = t->data;
  samples->dtype = t->dtype;
  samples->rows = t->shape[0];
  samples->columns = 1;
  for (int i = 1; i < t->ndim; ++i) samples->columns *= t->shape[i];
  samples->stride = samples->columns;
  return samples->columns > 0 || samples->rows == 0;
}

// Whether t is [...] for samples [B, ...]: the same number of elements in another shape may not
// broadcast.
bool is_of_sample(const Tensor& t, const Tensor& samples) {
  if (t.ndim != samples.ndim - 1) return false;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] != samples.shape[i + 1]) return false;
  }
  return true;
}

// Reads all arguments but the losses.
bool read_elementwise(py::handle object, py::handle target_, py::handle pos_weight, Tensor* input,
                      Elementwise* args) {
  Tensor target;
  if (!read_samples(object, input, &args->input)) return false;
  if (!read_samples(target_, &target, &args->target)) return false;
  if (is_negative(object) || is_negative(target_)) return false;
  if (!same_device(target, *input) || !same_shape(target, *input)) return false;
  if (!takes_target(target.dtype, *input)) return false;
  Tensor weight;
  return read_weight(pos_weight, *input, args->input.columns, &weight, &args->pos_weight) &&
         (args->pos_weight == nullptr || is_of_sample(weight, *input));
}

// Reads the arguments and calls gpu_kernel(args, scratch, stream) or cpu_kernel(args). Returns the
// losses, or None.
template <class GpuKernel, class CpuKernel>
py::object elementwise(py::handle input, py::handle target, py::handle pos_weight,
                       const GpuKernel& gpu_kernel, const CpuKernel& cpu_kernel) {
  Elementwise args;
  Tensor x;
  if (!read_elementwise(input, target, pos_weight, &x, &args)) return py::none();
  const NewTensor losses = new_empty(input, x, DType::f32, {args.input.rows});
  if (!losses.object) return py::none();
  args.losses = losses.view.as<float>();
  if (on_gpu(x)) {
    GpuCall call(x);
    py::gil_scoped_release release;
    void* scratch = call.scratch(KSAM_ON_GPU(elementwise_scratch_bytes, args));
    gpu_kernel(args, scratch, call.stream());
  } else {
    py::gil_scoped_release release;
    cpu_kernel(args);
  }
  return losses.object;
}

// The same with gpu_kernel(args, stream), for the gradient.
template <class GpuKernel, class CpuKernel>
py::object elementwise_backward(py::handle grad, py::handle input, py::handle target,
                                py::handle pos_weight, const GpuKernel& gpu_kernel,
                                const CpuKernel& cpu_kernel) {
  ElementwiseGradient args;
  Tensor x;
  if (!read_elementwise(input, target, pos_weight, &x, &args.forward)) return py::none();
  if (!read_upstream(grad, x, args.forward.input.rows, &args.grad)) return py::none();
  const NewTensor out = new_like(input, x);
  if (!out.object) return py::none();
  args.out = out.view.data;
  if (on_gpu(x)) {
    GpuCall call(x);
    py::gil_scoped_release release;
    gpu_kernel(args, call.stream());
  } else {
    py::gil_scoped_release release;
    cpu_kernel(args);
  }
  return out.object;
}

// input and target [B, ...] floating, contiguous; pos_weight [...] A or None;
// grad [B] f32, any stride. Losses [B] f32; gradients [B, ...] of the input's dtype.
py::object binary_cross_entropy(py::handle input, py::handle target, py::handle pos_weight) {
  return elementwise(
      input, target, pos_weight,
      [](const auto&... args) { KSAM_ON_GPU(binary_cross_entropy, args...); },
      [](const auto&... args) { KSAM_ON_ISA(binary_cross_entropy, args...); });
}

py::object binary_cross_entropy_backward(py::handle grad, py::handle input, py::handle target,
                                         py::handle pos_weight) {
  return elementwise_backward(
      grad, input, target, pos_weight,
      [](const auto&... args) { KSAM_ON_GPU(binary_cross_entropy_backward, args...); },
      [](const auto&... args) { KSAM_ON_ISA(binary_cross_entropy_backward, args...); });
}

py::object mse(py::handle input, py::handle target) {
  return elementwise(
      input, target, py::none(), [](const auto&... args) { KSAM_ON_GPU(mse, args...); },
      [](const auto&... args) { KSAM_ON_ISA(mse, args...); });
}

py::object mse_backward(py::handle grad, py::handle input, py::handle target) {
  return elementwise_backward(
      grad, input, target, py::none(),
      [](const auto&... args) { KSAM_ON_GPU(mse_backward, args...); },
      [](const auto&... args) { KSAM_ON_ISA(mse_backward, args...); });
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
