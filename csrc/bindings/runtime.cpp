#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kvlink/base/simd_level.hpp"
#include "kvlink/base/threads.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

void register_runtime(py::module_& module) {
  module.def("num_threads", &num_threads, "Threads the CPU operators use.");
  module.def("set_num_threads", &set_num_threads, py::arg("count"));
  module.def(
      "simd_level", [] { return simd_level_name(simd_level()); },
      "Level of the vector code in use: portable, avx2 or avx512.");
  module.def("set_simd_level", &set_simd_level, py::arg("name"));
  module.def(
      "supported_simd_levels",
      [] {
        std::vector<std::string> names;
        for (const SimdLevel level : supported_simd_levels()) {
          names.emplace_back(simd_level_name(level));
        }
        return names;
      },
      "Levels that this build has and this CPU runs, lowest first.");
}

}  // namespace kvlink::bindings
