// Inspects lists of tensors for backends that are written in Python, where looking at every tensor
// takes longer than the work. Declines anything out of the ordinary, which Python then looks at.
#include <pybind11/stl.h>

#include <algorithm>
#include <map>

#include "bindings.h"
#include "common/python.h"
#include "perturb/rows.h"

namespace py = pybind11;

namespace ksam {
namespace {

bool read_lists(const py::sequence& objects, std::vector<TensorList>* lists) {
  lists->resize(objects.size());
  for (size_t i = 0; i < lists->size(); ++i) {
    if (!read_tensors(py::object(objects[i]), &(*lists)[i])) return false;
  }
  return true;
}

bool is_on(const Tensor& t, const Tensor& first) {
  const bool known = t.device_type == dlpack::kCPU || t.device_type == dlpack::kCUDA ||
                     t.device_type == dlpack::kROCm;
  return known && same_device(t, first);
}

// Whether there are tensors in the lists, and all are on one device.
bool on_one_device(const py::sequence& objects) {
  std::vector<TensorList> lists;
  if (!read_lists(objects, &lists)) return false;
  const Tensor* first = nullptr;
  for (const TensorList& list : lists) {
    for (const Tensor& t : list) {
      if (first == nullptr) first = &t;
      if (!is_on(t, *first)) return false;
    }
  }
  return first != nullptr;
}

// Positions of lists as a mask, in which bit i stands for list i.
unsigned mask_of(const py::tuple& positions) {
  unsigned mask = 0;
  for (const py::handle i : positions) mask |= 1u << i.cast<unsigned>();
  return mask;
}

// Whether all lists are as long as the first, their tensors floating, of the shapes of the first
// list's and on one device. Besides, tensors of the lists at the positions `written` must not
// overlap themselves, those at `alike` must have the first list's dtypes, and `counters` must be
// empty or one float32 element for each tensor of a list.
bool fits(const py::sequence& objects, const py::tuple& written_, const py::tuple& alike_,
          py::handle counters_) {
  const unsigned written = mask_of(written_), alike = mask_of(alike_);
  std::vector<TensorList> lists;
  TensorList counters;
  if (!read_lists(objects, &lists) || !read_tensors(counters_, &counters)) return false;
  if (lists.empty() || lists[0].empty()) return false;
  const TensorList& model = lists[0];
  for (size_t i = 0; i < lists.size(); ++i) {
    if (lists[i].size() != model.size()) return false;
    for (size_t r = 0; r < model.size(); ++r) {
      const Tensor& t = lists[i][r];
      if (!is_floating(t.dtype) || !is_on(t, model[0]) || !same_shape(t, model[r])) return false;
      if ((alike >> i & 1) != 0 && t.dtype != model[r].dtype) return false;
      if ((written >> i & 1) != 0 && overlaps_itself(t)) return false;
    }
  }
  if (!counters.empty() && counters.size() != model.size()) return false;
  return std::all_of(counters.begin(), counters.end(), [&](const Tensor& t) {
    return t.dtype == DType::f32 && t.numel == 1 && is_on(t, model[0]);
  });
}

// The rows of one combination of dtypes, as records of ksam_kernels/perturb/triton_table.py.
struct Records {
  std::vector<int64_t> values;
  int64_t chunks = 0;

  void add(const std::vector<const Tensor*>& row, int64_t value, int64_t chunk) {
    uintptr_t every = 0;
    for (const Tensor* t : row) every |= reinterpret_cast<uintptr_t>(t->data);
    const int64_t numel = row[0]->numel;
    values.insert(values.end(), {numel, chunks, every % 16 == 0, value});
    for (const Tensor* t : row) values.push_back(reinterpret_cast<intptr_t>(t->data));
    chunks += (numel + chunk - 1) / chunk;
  }
};

// Whether one walk through memory meets the elements of all operands in the same order.
bool are_alike(const std::vector<const Tensor*>& row, const Tensor& first) {
  return is_dense(*row[0]) && std::all_of(row.begin(), row.end(), [&](const Tensor* t) {
           return is_floating(t->dtype) && is_on(*t, first) && same_shape(*t, *row[0]) &&
                  same_layout(*t, *row[0]);
         });
}

bool read_values(py::handle object, size_t count, std::vector<int64_t>* values) {
  values->assign(count, 0);
  if (object.is_none()) return true;
  if (!PyList_CheckExact(object.ptr()) || PyList_GET_SIZE(object.ptr()) != Py_ssize_t(count)) {
    return false;
  }
  for (size_t i = 0; i < count; ++i) {
    if (!read_int(PyList_GET_ITEM(object.ptr(), i), &(*values)[i])) return false;
  }
  return true;
}

// [(dtypes of the operands, as numbers, records), ...] in the order of the first rows; None if
// some row must be copied first.
py::object describe(const py::sequence& objects, py::handle values_, int64_t chunk) {
  std::vector<TensorList> lists;
  std::vector<int64_t> values;
  if (!read_lists(objects, &lists) || lists.empty()) return py::none();
  const size_t count = lists[0].size();
  for (const TensorList& list : lists) {
    if (list.size() != count) return py::none();
  }
  if (!read_values(values_, count, &values)) return py::none();

  std::map<std::vector<int>, size_t> places;
  std::vector<Records> found;
  std::vector<const Tensor*> row(lists.size());
  std::vector<int> dtypes(lists.size());
  for (size_t r = 0; r < count; ++r) {
    for (size_t i = 0; i < lists.size(); ++i) {
      row[i] = &lists[i][r];
      dtypes[i] = static_cast<int>(row[i]->dtype);
    }
    if (!are_alike(row, lists[0][0])) return py::none();
    if (row[0]->numel == 0) continue;
    const size_t place = places.try_emplace(dtypes, found.size()).first->second;
    if (place == found.size()) found.emplace_back();
    found[place].add(row, values[r], chunk);
  }
  py::list tables(found.size());
  for (const auto& [kinds, place] : places) {
    const std::vector<int64_t>& records = found[place].values;
    const py::bytes bytes(reinterpret_cast<const char*>(records.data()), records.size() * 8);
    tables[place] = py::make_tuple(py::tuple(py::cast(kinds)), bytes);
  }
  return tables;
}

}  // namespace

void bind_inspect(py::module_& m) {
  m.def("on_one_device", &on_one_device);
  m.def("fits", &fits);
  m.def("describe", &describe);
}

}  // namespace ksam
