#include <cstdlib>
#include <memory>

#include "common/python.h"
#include "rooms.h"
#include "topk/topk.h"

namespace py = pybind11;

namespace ksam {
namespace {

// losses [n] floating, contiguous; out [k] int64.
bool topk_indices(py::handle losses_, py::handle out_) {
  Tensor losses, out;
  if (!read_tensor(losses_, &losses) || !read_tensor(out_, &out)) return false;
  const int64_t k = out.numel;
  if (!on_cpu(losses) || !is_floating(losses.dtype)) return false;
  if (losses.ndim != 1 || !is_contiguous(losses)) return false;
  if (!on_cpu(out) || out.dtype != DType::i64 || !is_contiguous(out)) return false;
  if (k < 1 || k > losses.numel || losses.numel >> 32 != 0) return false;
  py::gil_scoped_release release;
  const std::unique_ptr<char[]> scratch(new char[topk_scratch_bytes(losses.dtype, losses.numel)]);
  KSAM_ON_ISA(topk_indices, losses, k, scratch.get(), out.as<int64_t>());
  return true;
}

}  // namespace

void bind_topk(py::module_& m) {
  m.def("topk_indices", &topk_indices, py::arg("losses"), py::arg("out"));
}

}  // namespace ksam
