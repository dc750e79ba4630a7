#include "kvlink/cpu/probes.hpp"

#include "register.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

void register_probes(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> nogil;
  module.def("probe_read_bandwidth", &cpu::probe_read_bandwidth, py::arg("num_bytes"),
             py::arg("seconds"), nogil, "Bytes read a second with num_threads() threads.");
  module.def("probe_copy_bandwidth", &cpu::probe_copy_bandwidth, py::arg("num_bytes"),
             py::arg("seconds"), nogil, "Bytes copied a second with num_threads() threads.");
  module.def("probe_fma_peak", &cpu::probe_fma_peak, py::arg("seconds"), nogil,
             "float32 operations a second with num_threads() threads; an FMA is two.");
}

}  // namespace kvlink::bindings
