// Reads the arguments of a call, checks them, and runs it on the tensors' device.
#include <algorithm>
#include <cmath>

#include "bindings.h"
#include "common/python.h"
#include "perturb/perturb.h"
#include "perturb/rows.h"
#include "perturb/update.h"

namespace py = pybind11;

namespace ksam {
namespace {

// Whether t is one float32 on the device of `tensors` or, if that list is empty, on any with
// kernels.
bool is_scalar_of(const TensorList& tensors, const Tensor& t) {
  if (t.dtype != DType::f32 || t.numel != 1) return false;
  return tensors.empty() ? has_kernels(t) : same_device(t, tensors[0]);
}

bool same_dtypes(const TensorList& a, const TensorList& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].dtype != b[i].dtype) return false;
  }
  return true;
}

bool has_doubles(const TensorList& list) {
  return std::any_of(list.begin(), list.end(),
                     [](const Tensor& t) { return t.dtype == DType::f64; });
}

// Reads the list that says where a call's kernels run. False if there are no kernels for its
// device, so that the other lists need not be read.
bool read_first(py::handle object, TensorList* list) {
  return read_tensors(object, list) && (list->empty() || has_kernels(list->front()));
}

// --- Norm ---------------------------------------------------------------------------------------

// One global norm, sqrt(sum (T g)^2).
struct NormCall {
  RowTable<2> table;  // (grads, params)
  bool adaptive;
  double eta;

  // False where the lists do not fit.
  bool build(const TensorList& grads, const TensorList& params) {
    const TensorList none;
    if (!table.build({&grads, adaptive ? &params : &none}, 0b00)) return false;
    if (has_doubles(grads) || (adaptive && has_doubles(params))) table.widen();
    return true;
  }

  double run_on_cpu() const {
    std::vector<double> partial(table.chunks());
    py::gil_scoped_release release;
    const double sum = KSAM_ON_ISA(sum_of_squares, table.rows(), adaptive, eta, partial.data());
    return std::sqrt(sum);
  }

  // The norm as a double, in device memory that lives as long as the call.
  const double* run_on_gpu(GpuCall* call, float* norm) const {
    const int64_t bytes = KSAM_ON_GPU(norm_scratch_bytes, table.rows());
    void* scratch = call->scratch(bytes);
    KSAM_ON_GPU(grad_norm, table.rows(), adaptive, eta, scratch, norm, call->stream());
    return static_cast<const double*>(scratch);
  }
};

// out: memory for the norm, one float32.
bool grad_norm(py::handle grads_, py::handle params_, bool adaptive, double eta, py::handle out_) {
  TensorList grads, params;
  Tensor out;
  if (!read_first(grads_, &grads) || !read_tensors(params_, &params)) return false;
  if (!read_tensor(out_, &out) || !is_scalar_of(grads, out)) return false;
  if (adaptive && params.size() != grads.size()) return false;
  NormCall norm{{}, adaptive, eta};
  if (!norm.build(grads, params)) return false;
  if (on_gpu(out)) {
    GpuCall call(out);
    py::gil_scoped_release release;
    norm.run_on_gpu(&call, out.as<float>());
  } else {
    *out.as<float>() = static_cast<float>(norm.run_on_cpu());
  }
  return true;
}

// --- Perturb and restore ------------------------------------------------------------------------

// Reads one radius for all parameters, or a list of one for each.
bool read_radii(py::handle value, size_t count, std::vector<double>* radii) {
  if (double radius; read_number(value, &radius)) {
    radii->assign(count, radius);
    return true;
  }
  if (!PyList_CheckExact(value.ptr()) || PyList_GET_SIZE(value.ptr()) != Py_ssize_t(count)) {
    return false;
  }
  radii->resize(count);
  for (size_t i = 0; i < count; ++i) {
    if (!read_number(PyList_GET_ITEM(value.ptr(), i), &(*radii)[i])) return false;
  }
  return true;
}

void perturb_on_gpu(const NormCall& norm, const Rows<3>& rows, PerturbArgs args,
                    const Tensor& out) {
  GpuCall call(out);
  py::gil_scoped_release release;
  args.norm = norm.run_on_gpu(&call, out.as<float>());
  KSAM_ON_GPU(perturb, rows, args, call.stream());
}

void perturb_on_cpu(const NormCall& norm, const Rows<3>& rows, PerturbArgs args,
                    const Tensor& out) {
  const double found = norm.run_on_cpu();
  args.norm = &found;
  py::gil_scoped_release release;
  KSAM_ON_ISA(perturb, rows, args);
  *out.as<float>() = static_cast<float>(found);
}

bool perturb_(py::handle params_, py::handle grads_, py::handle backup_, py::handle rho_,
              bool adaptive, double eta, py::handle out_) {
  TensorList params, grads, backup;
  Tensor out;
  if (!read_first(params_, &params) || !read_tensors(grads_, &grads)) return false;
  if (!read_tensors(backup_, &backup) || !read_tensor(out_, &out)) return false;
  if (grads.size() != params.size() || backup.size() != params.size()) return false;
  std::vector<double> radii;
  RowTable<3> table;
  NormCall norm{{}, adaptive, eta};
  if (!is_scalar_of(params, out) || !read_radii(rho_, params.size(), &radii) ||
      !table.build({&params, &grads, &backup}, 0b101) || !same_dtypes(params, backup) ||
      !norm.build(grads, params)) {
    return false;
  }
  const PerturbArgs args{nullptr, radii.data(), eta, adaptive};
  (on_gpu(out) ? perturb_on_gpu : perturb_on_cpu)(norm, table.rows(), args, out);
  return true;
}

bool restore_lists(const TensorList& params, const TensorList& backup) {
  RowTable<2> table;
  if (params.size() != backup.size() || !table.build({&params, &backup}, 0b01) ||
      !same_dtypes(params, backup)) {
    return false;
  }
  if (params.empty()) return true;
  if (on_gpu(params[0])) {
    GpuCall call(params[0]);
    py::gil_scoped_release release;
    KSAM_ON_GPU(restore, table.rows(), call.stream());
  } else {
    py::gil_scoped_release release;
    KSAM_ON_ISA(restore, table.rows());
  }
  return true;
}

bool restore_(py::handle params_, py::handle backup_) {
  TensorList params, backup;
  return read_first(params_, &params) && read_tensors(backup_, &backup) &&
         restore_lists(params, backup);
}

// --- Updates ------------------------------------------------------------------------------------

// The lists and scalars that both updates have.
struct UpdateCall {
  TensorList params, backup, grads;
  std::vector<float*> steps;  // one per parameter, or none
  Rate lr;
  Scaling scaling;

  bool read(py::handle params_, py::handle backup_, py::handle grads_, py::handle steps_,
            double lr_, py::handle device_lr, py::handle grad_scale, py::handle found_inf) {
    lr.number = lr_;
    return read_first(params_, &params) && read_tensors(backup_, &backup) &&
           read_tensors(grads_, &grads) && backup.size() == params.size() &&
           grads.size() == params.size() && same_dtypes(params, backup) && read_steps(steps_) &&
           read_scalar(device_lr, &lr.stored) && read_scalar(grad_scale, &scaling.grad_scale) &&
           read_scalar(found_inf, &scaling.found_inf);
  }

  bool read_steps(py::handle steps_) {
    TensorList tensors;
    if (!read_tensors(steps_, &tensors)) return false;
    if (!tensors.empty() && tensors.size() != params.size()) return false;
    for (const Tensor& step : tensors) {
      if (!is_scalar_of(params, step)) return false;
      steps.push_back(step.as<float>());
    }
    return true;
  }

  bool read_scalar(py::handle object, const float** out) const {
    Tensor t;
    if (!read_optional(object, &t)) return false;
    *out = t.as<float>();
    return object.is_none() || is_scalar_of(params, t);
  }

  // Null where no steps are counted.
  float* const* counters() const { return steps.empty() ? nullptr : steps.data(); }
  void count_up() const {
    for (float* step : steps) *step += 1;
  }

  // Kernels of a GPU look at found_inf themselves: the host would have to wait for it.
  bool overflows_on_cpu() const {
    return on_cpu(params[0]) && scaling.found_inf != nullptr && *scaling.found_inf != 0;
  }
};

void sgd_on_gpu(const UpdateCall& update, const Rows<4>& rows, const SgdArgs& args) {
  GpuCall call(update.params[0]);
  py::gil_scoped_release release;
  void* scratch = update.steps.empty() ? nullptr : call.scratch(kTicketBytes);
  KSAM_ON_GPU(restore_sgd, rows, args, update.counters(), scratch, call.stream());
}

void sgd_on_cpu(const UpdateCall& update, const Rows<4>& rows, const SgdArgs& args) {
  py::gil_scoped_release release;
  KSAM_ON_ISA(restore_sgd, rows, args, update.counters());
  update.count_up();
}

bool restore_sgd_(py::handle params_, py::handle backup_, py::handle grads_, py::handle buffers_,
                  py::handle steps_, double lr, double momentum, double dampening,
                  double weight_decay, bool nesterov, bool maximize, py::handle device_lr,
                  py::handle grad_scale, py::handle found_inf) {
  UpdateCall update;
  TensorList buffers;
  if (!update.read(params_, backup_, grads_, steps_, lr, device_lr, grad_scale, found_inf)) {
    return false;
  }
  if (!read_tensors(buffers_, &buffers)) return false;
  if (momentum == 0) buffers.clear();
  if (buffers.size() != (momentum == 0 ? 0 : update.params.size())) return false;
  RowTable<4> table;
  if (!table.build({&update.params, &update.backup, &update.grads, &buffers}, 0b1001)) return false;
  if (update.params.empty()) return true;
  if (update.overflows_on_cpu()) return restore_lists(update.params, update.backup);
  const SgdArgs args{
      update.lr, momentum, dampening, weight_decay, nesterov, maximize, update.scaling,
  };
  (on_gpu(update.params[0]) ? sgd_on_gpu : sgd_on_cpu)(update, table.rows(), args);
  return true;
}

std::vector<BiasCorrection> bias_corrections(const UpdateCall& update, const AdamArgs& args) {
  const double lr = value_of(args.lr);
  std::vector<BiasCorrection> corrections;
  double previous = 0;
  for (const float* step : update.steps) {
    const double t = double{*step} + 1;
    if (!corrections.empty() && t == previous) {  // mostly so, and powers are slow
      corrections.push_back(corrections.back());
    } else {
      corrections.push_back(
          {lr / (1 - std::pow(args.beta1, t)), std::sqrt(1 - std::pow(args.beta2, t))});
    }
    previous = t;
  }
  return corrections;
}

void adam_on_gpu(const UpdateCall& update, const Rows<5>& rows, const AdamArgs& args) {
  GpuCall call(update.params[0]);
  py::gil_scoped_release release;
  void* scratch = call.scratch(kTicketBytes);
  KSAM_ON_GPU(restore_adam, rows, args, update.counters(), scratch, call.stream());
}

void adam_on_cpu(const UpdateCall& update, const Rows<5>& rows, const AdamArgs& args) {
  const std::vector<BiasCorrection> corrections = bias_corrections(update, args);
  py::gil_scoped_release release;
  KSAM_ON_ISA(restore_adam, rows, args, corrections.data());
  update.count_up();
}

bool restore_adam_(py::handle params_, py::handle backup_, py::handle grads_, py::handle exp_avgs_,
                   py::handle exp_avg_sqs_, py::handle steps_, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize,
                   bool decoupled_weight_decay, py::handle device_lr, py::handle grad_scale,
                   py::handle found_inf) {
  UpdateCall update;
  TensorList means, squares;
  if (!update.read(params_, backup_, grads_, steps_, lr, device_lr, grad_scale, found_inf)) {
    return false;
  }
  if (!read_tensors(exp_avgs_, &means) || !read_tensors(exp_avg_sqs_, &squares)) return false;
  const size_t count = update.params.size();
  if (means.size() != count || squares.size() != count || update.steps.size() != count) {
    return false;
  }
  RowTable<5> table;
  if (!table.build({&update.params, &update.backup, &update.grads, &means, &squares}, 0b11001)) {
    return false;
  }
  if (count == 0) return true;
  if (update.overflows_on_cpu()) return restore_lists(update.params, update.backup);
  const AdamArgs args{
      update.lr, beta1, beta2, eps, weight_decay, maximize, decoupled_weight_decay, update.scaling};
  (on_gpu(update.params[0]) ? adam_on_gpu : adam_on_cpu)(update, table.rows(), args);
  return true;
}

}  // namespace

// Called by position, as keywords take longer. Names and order are those of the operators' schemas
// in ksam_kernels/perturb/operators.py; `norm` is the memory for what the first two return. The
// names show in the functions' docstrings, and cost some 0.1 us a call.
void bind_perturb(py::module_& m) {
  using py::arg;
  m.def("grad_norm", &grad_norm, arg("grads"), arg("params"), arg("adaptive"), arg("eta"),
        arg("norm"), py::pos_only());
  m.def("perturb_", &perturb_, arg("params"), arg("grads"), arg("backup"), arg("rho"),
        arg("adaptive"), arg("eta"), arg("norm"), py::pos_only());
  m.def("restore_", &restore_, arg("params"), arg("backup"), py::pos_only());
  m.def("restore_sgd_", &restore_sgd_, arg("params"), arg("backup"), arg("grads"),
        arg("momentum_buffers"), arg("steps"), arg("lr"), arg("momentum"), arg("dampening"),
        arg("weight_decay"), arg("nesterov"), arg("maximize"), arg("device_lr"), arg("grad_scale"),
        arg("found_inf"), py::pos_only());
  m.def("restore_adam_", &restore_adam_, arg("params"), arg("backup"), arg("grads"),
        arg("exp_avgs"), arg("exp_avg_sqs"), arg("steps"), arg("lr"), arg("beta1"), arg("beta2"),
        arg("eps"), arg("weight_decay"), arg("maximize"), arg("decoupled_weight_decay"),
        arg("device_lr"), arg("grad_scale"), arg("found_inf"), py::pos_only());
}

}  // namespace ksam
