#include "common/python.h"

#include <cmath>

namespace py = pybind11;

namespace ksam {
namespace {

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
const dlpack::ExchangeApi* api = nullptr;

// Names as vectorcall takes them: a method's, and the tuple of a call's keywords.
struct Names {
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* dtype = PyTuple_Pack(1, PyUnicode_InternFromString("dtype"));
};
const Names* names = nullptr;

PyObject *torch_empty_like = nullptr, *tensor_is_conj = nullptr, *tensor_is_neg = nullptr;
PyObject* out_of_memory_error = nullptr;

struct TorchDTypes {
  PyObject *f32, *f64, *i64;
};
TorchDTypes torch_dtypes;

PyObject* torch_dtype(DType dtype) {
  if (dtype == DType::f32) return torch_dtypes.f32;
  if (dtype == DType::f64) return torch_dtypes.f64;
  if (dtype == DType::i64) return torch_dtypes.i64;
  throw std::logic_error("no outputs have this dtype");
}

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
// are of imaginary parts, so no two elements are side by side; the stride of a dimension of size 1
// says nothing. (as_strided() and torch._neg_view() can make others.)
bool may_be_negative(const dlpack::Tensor& t) {
  if (t.dtype.code != dlpack::kFloat) return false;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] > 1 && t.strides[d] == 1) return false;
  }
  return true;
}

// question: a method of torch.Tensor; unbound, so that it is not looked up for every tensor.
bool says(py::handle tensor, PyObject* question) {
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(question, tensor.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Takes ownership of what a function of torch has returned; throws its error where that is null.
NewTensor as_new(PyObject* returned) {
  NewTensor made;
  made.object = py::reinterpret_steal<py::object>(returned);
  if (!made.object) throw py::error_already_set();
  if (!read_tensor(made.object, &made.view)) made.object = {};
  return made;
}

}  // namespace

void load_torch_types() {
  const py::module_ torch = py::module_::import("torch");
  py::object tensor = torch.attr("Tensor");
  py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->version.major != 1) api = api->older;
  if (api == nullptr || api->tensor_from_py_object == nullptr) {
    throw std::runtime_error(
        "ksam_kernels._C needs torch >= 2.11: this torch does not support DLPack 1.x");
  }
  // References that are never given back, as the types live as long as the process.
  const auto immortal = [](const py::object& of, const char* name) {
    return py::object(of.attr(name)).release().ptr();
  };
  tensor_is_conj = immortal(tensor, "is_conj");
  tensor_is_neg = immortal(tensor, "is_neg");
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  names = new Names;
  torch_dtypes = {immortal(torch, "float32"), immortal(torch, "float64"), immortal(torch, "int64")};
  torch_empty_like = immortal(torch, "empty_like");
  out_of_memory_error = immortal(torch, "OutOfMemoryError");
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const OutOfMemory& error) {
      PyErr_SetString(out_of_memory_error, error.what());
    }
  });
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
  return t.data != nullptr || out->numel == 0;  // null: a wrapper, such as functorch's
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

bool is_negative(py::handle tensor) { return says(tensor, tensor_is_neg); }
bool is_conjugate(py::handle tensor) { return says(tensor, tensor_is_conj); }

bool read_number(py::handle object, double* out) {
  if (!PyFloat_Check(object.ptr()) && !PyLong_CheckExact(object.ptr())) return false;
  *out = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred() == nullptr) return std::isfinite(*out);
  PyErr_Clear();  // an int may be too large for a double
  return false;
}

bool read_int(py::handle object, int64_t* out) {
  int overflow = 0;
  if (!PyLong_CheckExact(object.ptr())) return false;
  *out = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  return overflow == 0;
}

// Passes the sizes one by one: torch takes longer to parse a tuple of them. Without sizes, passes
// an empty tuple.
NewTensor new_empty(py::handle like, const Tensor& t, DType dtype,
                    const std::vector<int64_t>& sizes) {
  std::vector<py::object> shape;
  for (const int64_t size : sizes) shape.push_back(py::int_(size));
  if (sizes.empty()) shape.push_back(py::tuple());
  std::vector<PyObject*> arguments{like.ptr()};
  for (const py::object& size : shape) arguments.push_back(size.ptr());
  const size_t positional = arguments.size();
  const bool converts = dtype != t.dtype;
  if (converts) arguments.push_back(torch_dtype(dtype));
  return as_new(PyObject_VectorcallMethod(names->new_empty, arguments.data(), positional,
                                          converts ? names->dtype : nullptr));
}

NewTensor empty_like(py::handle tensor) {
  return as_new(PyObject_CallOneArg(torch_empty_like, tensor.ptr()));
}

}  // namespace ksam
