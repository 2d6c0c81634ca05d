// Batches that are trees of plain dicts, lists and tuples. ksam_kernels/compact/tree.py handles all
// others, in the same order.
#pragma once

#include <utility>

#include "common/python.h"

namespace ksam {

// Another tree of the same containers, with on_tensor(object, tensor) in place of every plain
// tensor that has dimensions. Null where there is a node that is not known here, or where
// on_tensor returned null.
template <class OnTensor>
pybind11::object map_plain(pybind11::handle node, const OnTensor& on_tensor);

// --- Its parts ----------------------------------------------------------------------------------

// Nodes that are not copied, as no child of theirs can be a tensor.
inline bool is_plain_leaf(PyObject* node) {
  return node == Py_None || PyUnicode_CheckExact(node) || PyBool_Check(node) ||
         PyLong_CheckExact(node) || PyFloat_CheckExact(node) || PyBytes_CheckExact(node);
}

// One level of recursion, so that a batch which contains itself ends in a RecursionError.
class Descent {
 public:
  Descent() {
    if (Py_EnterRecursiveCall(" in a batch") != 0) throw pybind11::error_already_set();
  }
  ~Descent() { Py_LeaveRecursiveCall(); }
  Descent(const Descent&) = delete;
  Descent& operator=(const Descent&) = delete;
};

// on_tensor may let other threads run, which may change the containers. So dicts are walked in a
// copy, and every child of a list or tuple is owned while it is used.
template <class OnTensor>
pybind11::object map_plain_dict(PyObject* node, const OnTensor& on_tensor) {
  const auto copy = pybind11::reinterpret_steal<pybind11::object>(PyDict_Copy(node));
  if (!copy) throw pybind11::error_already_set();
  pybind11::dict mapped;
  PyObject *key, *value;
  for (Py_ssize_t place = 0; PyDict_Next(copy.ptr(), &place, &key, &value);) {
    const pybind11::object child = map_plain(value, on_tensor);
    if (!child) return {};
    if (PyDict_SetItem(mapped.ptr(), key, child.ptr()) != 0) throw pybind11::error_already_set();
  }
  return std::move(mapped);
}

template <class OnTensor>
pybind11::object map_plain_sequence(PyObject* node, const OnTensor& on_tensor) {
  pybind11::list mapped;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(node); ++i) {
    const auto value =
        pybind11::reinterpret_borrow<pybind11::object>(PySequence_Fast_GET_ITEM(node, i));
    const pybind11::object child = map_plain(value, on_tensor);
    if (!child) return {};
    mapped.append(child);
  }
  if (PyList_CheckExact(node)) return std::move(mapped);
  return pybind11::tuple(mapped);
}

template <class OnTensor>
pybind11::object map_plain(pybind11::handle node, const OnTensor& on_tensor) {
  if (Tensor t; read_tensor(node, &t)) {
    return t.ndim > 0 ? on_tensor(node, t) : pybind11::reinterpret_borrow<pybind11::object>(node);
  }
  if (is_plain_leaf(node.ptr())) return pybind11::reinterpret_borrow<pybind11::object>(node);
  const Descent descent;
  if (PyDict_CheckExact(node.ptr())) return map_plain_dict(node.ptr(), on_tensor);
  if (PyList_CheckExact(node.ptr()) || PyTuple_CheckExact(node.ptr())) {
    return map_plain_sequence(node.ptr(), on_tensor);
  }
  return {};
}

}  // namespace ksam
