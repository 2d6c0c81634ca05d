#include <vector>

#include "bindings.h"
#include "common/python.h"
#include "compact/compact.h"
#include "compact/tree.h"

namespace py = pybind11;

namespace ksam {
namespace {

// Whether rows are blocks of bytes: those of `source` [B, ...] have the layout of those of
// `out` [k, ...], and these have no gaps in or between them.
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

// A tensor without bytes to copy becomes no leaf. False where a tensor is not taken.
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

// An index out of range is left for the device to find: the host would have to wait to look at it.
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

bool read_indices(py::handle object, Tensor* indices) {
  if (!read_tensor(object, indices) || !has_kernels(*indices) || indices->ndim != 1) return false;
  return indices->dtype == DType::i32 || indices->dtype == DType::i64;
}

bool gather(const std::vector<Tensor>& tensors, const Tensor& indices,
            const std::vector<Tensor>& out) {
  std::vector<Leaf> leaves;
  if (!read_leaves(tensors, out, indices, &leaves)) return false;
  if (tensors.empty()) return true;
  return (on_gpu(indices) ? run_on_gpu : run_on_cpu)(leaves, indices, tensors[0].shape[0]);
}

// The tensors of a batch, each with memory for its chosen rows.
struct Gather {
  const py::handle empty_rows;
  const int64_t k;
  std::vector<Tensor> tensors, out;
  std::vector<py::object> owners;  // of the memory that `tensors` and `out` view

  // Notes the tensor, and returns the memory for its k rows; null where it is not taken.
  py::object add(py::handle tensor, const Tensor& t) {
    if (is_negative(tensor) || is_conjugate(tensor)) return {};
    NewTensor rows = memory_for(tensor, t);
    if (!rows.object) return {};
    tensors.push_back(t);
    out.push_back(rows.view);
    owners.push_back(py::reinterpret_borrow<py::object>(tensor));
    owners.push_back(rows.object);
    return rows.object;
  }

  NewTensor memory_for(py::handle tensor, const Tensor& t) const {
    if (is_contiguous(t)) {
      std::vector<int64_t> sizes(t.shape, t.shape + t.ndim);
      sizes[0] = k;
      return new_empty(tensor, t, t.dtype, sizes);
    }
    NewTensor rows{empty_rows(tensor, k), {}};
    if (!read_tensor(rows.object, &rows.view)) rows.object = {};
    return rows;
  }
};

// batch: a tree of tensors [B, ...] of any dtype; indices [k] int32 or int64, in [0, B); all on one
// device. empty_rows(tensor, k) allocates k rows like those of a tensor that is not contiguous.
// Returns the tree with tensors [k, ...], or None.
py::object compact(py::handle batch, py::handle indices_, py::handle empty_rows) {
  Tensor indices;
  if (!read_indices(indices_, &indices)) return py::none();
  Gather rows{empty_rows, indices.numel, {}, {}, {}};
  py::object mapped =
      map_plain(batch, [&](py::handle tensor, const Tensor& t) { return rows.add(tensor, t); });
  return mapped && gather(rows.tensors, indices, rows.out) ? mapped : py::none();
}

}  // namespace

void bind_compact(py::module_& m) { m.def("compact", &compact); }

}  // namespace ksam
