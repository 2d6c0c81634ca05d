// _simt: the CUDA kernels, and the functions that bind them for Python, run by the runner.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/python.h"
#include "runner.h"

namespace py = pybind11;

PYBIND11_MODULE(_simt, m) {
  ksam::load_torch_types();
  py::register_exception<simt::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_seed", &simt::set_seed);
  ksam::bind_loss(m);
  ksam::bind_topk(m);
  ksam::bind_compact(m);
  ksam::bind_perturb(m);
}
