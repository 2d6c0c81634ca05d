#include "common/python.h"
#include "rooms.h"

namespace py = pybind11;

namespace ksam {

void bind_compact(py::module_&) {}

}  // namespace ksam
