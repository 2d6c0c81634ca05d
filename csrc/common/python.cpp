#include "common/python.h"

namespace py = pybind11;

namespace ksam {
namespace {

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
const dlpack::ExchangeApi* api = nullptr;

DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::other;
  if (type.code == dlpack::kFloat) {
    if (type.bits == 32) return DType::f32;
    if (type.bits == 64) return DType::f64;
    if (type.bits == 16) return DType::f16;
  }
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bf16;
  if (type.code == dlpack::kInt && type.bits == 32) return DType::i32;
  if (type.code == dlpack::kInt && type.bits == 64) return DType::i64;
  return DType::other;
}

// torch's negative bit: the numbers are the negatives of what the memory holds. Views that have it
// are of imaginary parts, so their elements are never side by side.
bool may_be_negative(const dlpack::Tensor& t) {
  return t.dtype.code == dlpack::kFloat && (t.ndim == 0 || t.strides[t.ndim - 1] != 1);
}

bool is_negative(py::handle object) { return object.attr("is_neg")().cast<bool>(); }

}  // namespace

void load_torch_types() {
  py::object tensor = py::module_::import("torch").attr("Tensor");
  py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->version.major != 1) api = api->older;
  if (api == nullptr || api->tensor_from_py_object == nullptr) {
    throw std::runtime_error("this torch has no DLPack 1.x exchange of tensors without a copy");
  }
  // Kept for the life of the process, like the types themselves.
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
}

const dlpack::ExchangeApi& torch_api() { return *api; }

bool read_tensor(py::handle object, Tensor* out) {
  if (Py_TYPE(object.ptr()) != tensor_type && Py_TYPE(object.ptr()) != parameter_type) return false;
  dlpack::Tensor t;
  if (api->tensor_from_py_object(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (may_be_negative(t) && is_negative(object)) return false;
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  out->shape = t.shape;
  out->strides = t.strides;
  out->ndim = t.ndim;
  out->itemsize = t.dtype.bits * t.dtype.lanes / 8;  // float4 comes as two lanes of half a byte
  out->device_type = t.device.type;
  out->device_id = t.device.id;
  out->dtype = dtype_of(t.dtype);
  out->numel = 1;
  for (int i = 0; i < t.ndim; ++i) out->numel *= t.shape[i];
  return t.data != nullptr || out->numel == 0;  // null: a wrapper, functorch's for one
}

bool read_tensors(py::handle list, std::vector<Tensor>* out) {
  PyObject* items = list.ptr();
  if (!PyList_CheckExact(items) && !PyTuple_CheckExact(items)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
  PyObject** begin = PySequence_Fast_ITEMS(items);
  out->resize(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read_tensor(begin[i], &(*out)[i])) return false;
  }
  return true;
}

bool read_optional(py::handle object, Tensor* out) {
  if (!object.is_none()) return read_tensor(object, out);
  *out = Tensor{};
  return true;
}

}  // namespace ksam
