#include <pybind11/pybind11.h>

#include "kvlink/base/threads.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

void register_runtime(py::module_& module) {
  module.def("num_threads", &num_threads, "Threads the CPU operators use.");
  module.def("set_num_threads", &set_num_threads, py::arg("count"));
}

}  // namespace kvlink::bindings
