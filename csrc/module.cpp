// ksam_kernels._C: what was built, and every room's kernels.
//
// A kernel allocates what it returns, or writes in place and returns True. If it does not take an
// argument (a device, a dtype, a layout, a subclass of Tensor), it returns None or False and has
// written nothing; ksam_kernels/<room>/native.py says what happens then.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/gpu_runtime.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/python.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of ksam_kernels.";
  ksam::load_torch_types();
  ksam::load_thread_pool();
  m.attr("cpu_isa") = ksam::isa_name(ksam::current_isa());
  m.attr("compiler") = __VERSION__;
#if defined(KSAM_CUDA)
  m.attr("cuda_architectures") = KSAM_CUDA_ARCHITECTURES;
  m.def("has_code_for", &ksam::gpu::has_code_for);
  m.def("why_no_code", &ksam::gpu::why_no_code);
#else
  m.attr("cuda_architectures") = "";
#endif
#if defined(KSAM_SANITIZED)
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  ksam::bind_loss(m);
  ksam::bind_topk(m);
  ksam::bind_compact(m);
  ksam::bind_perturb(m);
  ksam::bind_inspect(m);
}
