#include <cmath>
#include <memory>

#include "common/python.h"
#include "perturb/perturb.h"
#include "perturb/rows.h"
#include "rooms.h"

namespace py = pybind11;

namespace ksam {
namespace {

using TensorList = std::vector<Tensor>;

bool is_scalar(const Tensor& t) { return on_cpu(t) && t.dtype == DType::f32 && t.numel == 1; }

bool same_dtypes(const TensorList& a, const TensorList& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].dtype != b[i].dtype) return false;
  }
  return true;
}

// sqrt(sum (T g)^2). False where the lists do not fit.
bool norm_of(const TensorList& grads, const TensorList& params, double eta, double* norm) {
  const bool adaptive = !params.empty();
  RowTable<2> table;
  if (!table.build({&grads, &params})) return false;
  for (const TensorList* list : {&grads, &params}) {
    for (const Tensor& t : *list) {
      if (t.dtype == DType::f64) table.widen();
    }
  }
  std::vector<double> partial(table.chunks());
  py::gil_scoped_release release;
  const double sum = KSAM_ON_ISA(sum_of_squares, table.rows(), adaptive, eta, partial.data());
  *norm = std::sqrt(sum);
  return true;
}

// out: one float32.
bool grad_norm(py::handle grads_, py::handle params_, bool adaptive, double eta, py::handle out_) {
  TensorList grads, params;
  Tensor out;
  if (!read_tensors(grads_, &grads) || !read_tensors(params_, &params)) return false;
  if (!read_tensor(out_, &out) || !is_scalar(out)) return false;
  if (adaptive && params.size() != grads.size()) return false;
  if (!adaptive) params.clear();
  double norm;
  if (!norm_of(grads, params, eta, &norm)) return false;
  *out.as<float>() = static_cast<float>(norm);
  return true;
}

// A radius for all or one per parameter, finite and not negative.
bool read_radii(py::handle value, size_t count, std::vector<double>* radii) {
  if (PyFloat_Check(value.ptr()) || PyLong_CheckExact(value.ptr())) {
    radii->assign(count, PyFloat_AsDouble(value.ptr()));
  } else {
    if (!PyList_CheckExact(value.ptr()) || PyList_GET_SIZE(value.ptr()) != Py_ssize_t(count)) {
      return false;
    }
    for (size_t i = 0; i < count; ++i) {
      PyObject* item = PyList_GET_ITEM(value.ptr(), i);
      if (!PyFloat_Check(item) && !PyLong_CheckExact(item)) return false;
      radii->push_back(PyFloat_AsDouble(item));
    }
  }
  for (double radius : *radii) {
    if (!(radius >= 0) || std::isinf(radius)) return false;
  }
  return true;
}

bool perturb_(py::handle params_, py::handle grads_, py::handle backup_, py::handle rho_,
              bool adaptive, double eta, py::handle out_) {
  TensorList params, grads, backup;
  Tensor out;
  if (!read_tensors(params_, &params) || !read_tensors(grads_, &grads)) return false;
  if (!read_tensors(backup_, &backup) || !read_tensor(out_, &out) || !is_scalar(out)) return false;
  if (grads.size() != params.size() || backup.size() != params.size()) return false;
  std::vector<double> radii;
  RowTable<3> table;
  if (!read_radii(rho_, params.size(), &radii) || !table.build({&params, &grads, &backup}) ||
      !same_dtypes(params, backup)) {
    return false;
  }
  const TensorList unweighted;
  double norm;
  if (!norm_of(grads, adaptive ? params : unweighted, eta, &norm)) return false;
  const float shown = static_cast<float>(norm);
  // A double that rounds to 0 or to infinity moves nothing either: what is returned says so.
  const bool moves = shown > 0 && std::isfinite(shown);
  const PerturbArgs args{norm, radii.data(), eta, adaptive, moves};
  py::gil_scoped_release release;
  KSAM_ON_ISA(perturb, table.rows(), args);
  *out.as<float>() = shown;
  return true;
}

bool restore_lists(const TensorList& params, const TensorList& backup) {
  RowTable<2> table;
  if (params.size() != backup.size() || !table.build({&params, &backup}) ||
      !same_dtypes(params, backup)) {
    return false;
  }
  py::gil_scoped_release release;
  KSAM_ON_ISA(restore, table.rows());
  return true;
}

bool restore_(py::handle params_, py::handle backup_) {
  TensorList params, backup;
  return read_tensors(params_, &params) && read_tensors(backup_, &backup) &&
         restore_lists(params, backup);
}

// What gradient scaling adds to an update: a divisor, and whether to leave the update out.
struct Scaling {
  bool scaled = false;
  bool skip = false;
  float scale = 1;
};

bool read_scaling(py::handle grad_scale_, py::handle found_inf_, Scaling* out) {
  Tensor grad_scale, found_inf;
  if (!read_optional(grad_scale_, &grad_scale) || !read_optional(found_inf_, &found_inf)) {
    return false;
  }
  if (grad_scale.data != nullptr) {
    if (!is_scalar(grad_scale)) return false;
    out->scaled = true;
    out->scale = *grad_scale.as<float>();
  }
  if (found_inf.data != nullptr) {
    if (!is_scalar(found_inf)) return false;
    out->skip = *found_inf.as<float>() != 0;
  }
  return true;
}

bool read_steps(py::handle steps_, size_t count, TensorList* steps) {
  if (!read_tensors(steps_, steps) || steps->size() != count) return false;
  for (const Tensor& step : *steps) {
    if (!is_scalar(step)) return false;
  }
  return true;
}

void count_up(const TensorList& steps) {
  for (const Tensor& step : steps) *step.as<float>() += 1;
}

bool restore_sgd_(py::handle params_, py::handle backup_, py::handle grads_, py::handle buffers_,
                  py::handle steps_, double lr, double momentum, double dampening,
                  double weight_decay, bool nesterov, bool maximize, py::handle grad_scale,
                  py::handle found_inf) {
  TensorList params, backup, grads, buffers, steps;
  Scaling scaling;
  if (!read_tensors(params_, &params) || !read_tensors(backup_, &backup) ||
      !read_tensors(grads_, &grads) || !read_tensors(buffers_, &buffers) ||
      !read_scaling(grad_scale, found_inf, &scaling)) {
    return false;
  }
  const bool counted = py::len(steps_) != 0;
  if (counted && !read_steps(steps_, params.size(), &steps)) return false;
  if (momentum == 0) buffers.clear();
  if (backup.size() != params.size() || grads.size() != params.size() ||
      buffers.size() != (momentum == 0 ? 0 : params.size())) {
    return false;
  }
  RowTable<4> table;
  if (!table.build({&params, &backup, &grads, &buffers}) || !same_dtypes(params, backup)) {
    return false;
  }
  if (scaling.skip) return restore_lists(params, backup);
  const std::unique_ptr<bool[]> first(new bool[params.size()]());
  for (size_t i = 0; i < steps.size(); ++i) first[i] = *steps[i].as<float>() == 0;
  const SgdArgs args{lr,       momentum,       dampening,     weight_decay, nesterov,
                     maximize, scaling.scaled, scaling.scale, first.get()};
  py::gil_scoped_release release;
  KSAM_ON_ISA(restore_sgd, table.rows(), args);
  count_up(steps);
  return true;
}

// lr / (1 - beta1^t) and sqrt(1 - beta2^t) for every parameter; t counts the step to be taken.
void bias_corrections(const TensorList& steps, double lr, double beta1, double beta2,
                      std::vector<double>* step_size, std::vector<double>* root_correction) {
  double previous = -1, size = 0, root = 0;
  for (const Tensor& step : steps) {
    const double t = double{*step.as<float>()} + 1;
    if (t != previous) {  // all the same in most runs, and powers are dear
      size = lr / (1 - std::pow(beta1, t));
      root = std::sqrt(1 - std::pow(beta2, t));
      previous = t;
    }
    step_size->push_back(size);
    root_correction->push_back(root);
  }
}

bool restore_adam_(py::handle params_, py::handle backup_, py::handle grads_, py::handle exp_avgs_,
                   py::handle exp_avg_sqs_, py::handle steps_, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize,
                   bool decoupled_weight_decay, py::handle grad_scale, py::handle found_inf) {
  TensorList params, backup, grads, exp_avgs, exp_avg_sqs, steps;
  Scaling scaling;
  if (!read_tensors(params_, &params) || !read_tensors(backup_, &backup) ||
      !read_tensors(grads_, &grads) || !read_tensors(exp_avgs_, &exp_avgs) ||
      !read_tensors(exp_avg_sqs_, &exp_avg_sqs) || !read_steps(steps_, params.size(), &steps) ||
      !read_scaling(grad_scale, found_inf, &scaling)) {
    return false;
  }
  for (const TensorList* list : {&backup, &grads, &exp_avgs, &exp_avg_sqs}) {
    if (list->size() != params.size()) return false;
  }
  RowTable<5> table;
  if (!table.build({&params, &backup, &grads, &exp_avgs, &exp_avg_sqs}) ||
      !same_dtypes(params, backup)) {
    return false;
  }
  if (scaling.skip) return restore_lists(params, backup);
  std::vector<double> step_size, root_correction;
  bias_corrections(steps, lr, beta1, beta2, &step_size, &root_correction);
  const AdamArgs args{lr,
                      beta1,
                      beta2,
                      eps,
                      weight_decay,
                      maximize,
                      decoupled_weight_decay,
                      scaling.scaled,
                      scaling.scale,
                      step_size.data(),
                      root_correction.data()};
  py::gil_scoped_release release;
  KSAM_ON_ISA(restore_adam, table.rows(), args);
  count_up(steps);
  return true;
}

}  // namespace

void bind_perturb(py::module_& m) {
  m.def("grad_norm", &grad_norm);
  m.def("perturb_", &perturb_);
  m.def("restore_", &restore_);
  m.def("restore_sgd_", &restore_sgd_);
  m.def("restore_adam_", &restore_adam_);
}

}  // namespace ksam
