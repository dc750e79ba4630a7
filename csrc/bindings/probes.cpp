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
  py::class_<cpu::MemoryProbe>(module, "MemoryProbe",
                               "Two pieces of memory as pools have it; each call copies one to the "
                               "other, or reads one, with num_threads() threads.")
      .def(py::init<int64_t, bool>(), py::arg("num_bytes"), py::arg("shared") = false, nogil,
           "num_bytes: of each piece, in whole MiB. Tries which way of copying is the fastest "
           "here. Raises InvalidArgument, OSError.")
      .def("copy", py::overload_cast<>(&cpu::MemoryProbe::copy), nogil,
           "Copies in the fastest way; the seconds it took.")
      .def("copy_plain", &cpu::MemoryProbe::copy_plain, nogil,
           "Copies by the C library's memcpy; the seconds it took.")
      .def("read", &cpu::MemoryProbe::read, nogil, "The seconds it took.")
      .def_property_readonly("num_bytes", &cpu::MemoryProbe::size)
      .def_property_readonly("copied_by", &cpu::MemoryProbe::copied_by,
                             "'streaming stores' or 'memcpy'.");
}

}  // namespace kvlink::bindings
