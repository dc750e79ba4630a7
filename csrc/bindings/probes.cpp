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
  module.def("probe_dot_peak", &cpu::probe_dot_peak, py::arg("seconds"), nogil,
             "The same of products of pairs of bfloat16 with float32 sums, four operations each; 0 "
             "where there is no instruction for them.");
}

}  // namespace kvlink::bindings
