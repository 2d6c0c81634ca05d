#include <vector>

#include "common/python.h"
#include "compact/compact.h"
#include "rooms.h"

namespace py = pybind11;

namespace ksam {
namespace {

// Whether rows are blocks of bytes: those of `source` [B, ...] lie in memory as those of `out`
// [k, ...] do, which have no gaps in or between them.
bool same_rows(const Tensor& source, const Tensor& out) {
  if (source.ndim < 1 || source.ndim != out.ndim || source.itemsize != out.itemsize) return false;
  int64_t row = 1, last = 0;  // elements of a row, and the place of its last one
  for (int i = 1; i < out.ndim; ++i) {
    if (source.shape[i] != out.shape[i]) return false;
    if (source.strides[i] != out.strides[i] && out.shape[i] > 1) return false;
    row *= out.shape[i];
    last += (out.shape[i] - 1) * out.strides[i];
  }
  if (row == 0) return true;
  return last == row - 1 && (out.strides[0] == row || out.shape[0] <= 1);
}

// Leaves out tensors without bytes to copy. False where a tensor is not taken.
bool read_leaves(const std::vector<Tensor>& tensors, const std::vector<Tensor>& out,
                 const Tensor& indices, std::vector<Leaf>* leaves) {
  const int64_t k = indices.numel;
  if (tensors.size() != out.size()) return false;
  for (size_t i = 0; i < out.size(); ++i) {
    const Tensor& source = tensors[i];
    if (!same_device(source, indices) || !same_device(out[i], indices)) return false;
    if (!same_rows(source, out[i])) return false;
    if (source.shape[0] != tensors[0].shape[0] || out[i].shape[0] != k) return false;
    if (out[i].numel == 0) continue;
    leaves->push_back({source.data, source.strides[0] * source.itemsize, out[i].data,
                       out[i].numel / k * out[i].itemsize});
  }
  return true;
}

// The device finds an index out of range: the host would have to wait for it.
bool run_on_gpu(const std::vector<Leaf>& leaves, const Tensor& indices, int64_t rows) {
  if (leaves.empty()) return true;
  GpuCall call(indices);
  py::gil_scoped_release release;
  KSAM_ON_GPU(gather_rows, leaves.data(), static_cast<int64_t>(leaves.size()), indices, rows,
              call.stream());
  return true;
}

bool run_on_cpu(const std::vector<Leaf>& leaves, const Tensor& indices, int64_t rows) {
  if (!in_range(indices, rows)) return false;
  py::gil_scoped_release release;
  gather_rows(leaves.data(), static_cast<int64_t>(leaves.size()), indices);
  return true;
}

// tensors: each [B, ...], any dtype; indices [k] int32 or int64, in [0, B); out: each [k, ...]; all
// on one device.
bool compact(py::handle tensors_, py::handle indices_, py::handle out_) {
  std::vector<Tensor> tensors, out;
  Tensor indices;
  if (!read_tensors(tensors_, &tensors) || !read_tensors(out_, &out)) return false;
  if (!read_tensor(indices_, &indices) || !has_kernels(indices) || indices.ndim != 1) return false;
  if (indices.dtype != DType::i32 && indices.dtype != DType::i64) return false;
  std::vector<Leaf> leaves;
  if (!read_leaves(tensors, out, indices, &leaves)) return false;
  if (tensors.empty()) return true;
  return (on_gpu(indices) ? run_on_gpu : run_on_cpu)(leaves, indices, tensors[0].shape[0]);
}

}  // namespace

void bind_compact(py::module_& m) {
  m.def("compact", &compact, py::arg("tensors"), py::arg("indices"), py::arg("out"));
}

}  // namespace ksam
