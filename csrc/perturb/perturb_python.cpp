#include "common/python.h"
#include "rooms.h"

namespace py = pybind11;

namespace ksam {

void bind_perturb(py::module_&) {}

}  // namespace ksam
