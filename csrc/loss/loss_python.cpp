#include "common/python.h"
#include "rooms.h"

namespace py = pybind11;

namespace ksam {

void bind_loss(py::module_&) {}

}  // namespace ksam
