#include "cuda_module.hpp"
#include "kvlink/cuda/apply_rope.hpp"
#include "op_args.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

void apply_rope(const py::object& x, const py::object& out, const py::object& rope,
                uintptr_t stream) {
  const py::tuple device = x.attr("__dlpack_device__")();
  const DeviceGuard guard(device[1].cast<int>());
  const ConsumerStream consumer(static_cast<int64_t>(stream));
  const ApplyRopeArgs args(x, out, rope, false);
  KVLINK_CHECK(args.x.device().type == dlpack::kDeviceCuda,
               "x: expected an array on a CUDA device; got device type ", args.x.device().type);
  const py::gil_scoped_release release;
  cuda::apply_rope(args.params, as_stream(stream));
}

}  // namespace

void register_cuda_rope(py::module_& module) {
  module.def("apply_rope", &apply_rope, py::arg("x"), py::arg("out"), py::arg("rope"),
             py::arg("stream"), "See kvlink.apply_rope.");
}

}  // namespace kvlink::bindings
