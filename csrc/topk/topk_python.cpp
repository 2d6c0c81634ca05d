#include <memory>

#include "bindings.h"
#include "common/python.h"
#include "topk/topk.h"

namespace py = pybind11;

namespace ksam {
namespace {

void run_on_gpu(const Tensor& losses, int64_t k, int64_t* out) {
  GpuCall call(losses);
  py::gil_scoped_release release;
  void* scratch = call.scratch(KSAM_ON_GPU(topk_scratch_bytes, losses.numel));
  KSAM_ON_GPU(topk_indices, losses, k, scratch, out, call.stream());
}

void run_on_cpu(const Tensor& losses, int64_t k, int64_t* out) {
  py::gil_scoped_release release;
  const std::unique_ptr<char[]> scratch(new char[topk_scratch_bytes(losses.dtype, losses.numel)]);
  KSAM_ON_ISA(topk_indices, losses, k, scratch.get(), out);
}

// losses [n] floating, contiguous if on a GPU; 1 <= k <= n. Returns indices [k] int64, or None.
py::object topk_indices(py::handle losses_, py::handle k_) {
  Tensor losses;
  int64_t k;
  if (!read_tensor(losses_, &losses) || is_negative(losses_)) return py::none();
  if (!has_kernels(losses) || !is_floating(losses.dtype)) return py::none();
  if (losses.ndim != 1 || (on_gpu(losses) && !is_contiguous(losses))) return py::none();
  if (!read_int(k_, &k) || k < 1 || k > losses.numel) return py::none();
  if (losses.numel >> 32 != 0) return py::none();
  const NewTensor out = new_empty(losses_, losses, DType::i64, {k});
  if (!out.object) return py::none();
  (on_gpu(losses) ? run_on_gpu : run_on_cpu)(losses, k, out.view.as<int64_t>());
  return out.object;
}

}  // namespace

void bind_topk(py::module_& m) { m.def("topk_indices", &topk_indices); }

}  // namespace ksam
