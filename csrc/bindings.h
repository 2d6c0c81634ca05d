// Add each room's functions to the Python module. Defined in <room>/<room>_python.cpp, the last one
// in perturb/inspect_python.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace ksam {

void bind_loss(pybind11::module_& m);
void bind_topk(pybind11::module_& m);
void bind_compact(pybind11::module_& m);
void bind_perturb(pybind11::module_& m);
void bind_inspect(pybind11::module_& m);

}  // namespace ksam
