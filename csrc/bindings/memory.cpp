#include <pybind11/stl.h>

#include <memory>

#include "kvlink/base/check.hpp"
#include "kvlink/base/segment.hpp"
#include "register.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

// Memory of somebody else, exported through DLPack. Bound as kvlink._C.ArrayView.
struct ArrayView {
  uintptr_t address;
  std::vector<int64_t> shape, strides;
  DType dtype;
  std::pair<int32_t, int32_t> device;
  py::object owner;
};

dlpack::DataType dlpack_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {dlpack::kFloat, 32, 1};
    case DType::kFloat16:
      return {dlpack::kFloat, 16, 1};
    case DType::kBFloat16:
      return {dlpack::kBFloat, 16, 1};
    case DType::kFloat8E4M3:
      return {dlpack::kFloat8E4M3FN, 8, 1};
    case DType::kFloat8E5M2:
      return {dlpack::kFloat8E5M2, 8, 1};
    case DType::kInt8:
      return {dlpack::kInt, 8, 1};
    case DType::kUInt8:
      return {dlpack::kUInt, 8, 1};
  }
  throw InvalidArgument("dtype: unknown");
}

// What an exported tensor points into; owns a reference to the ArrayView.
template <typename Managed>
struct Export {
  ArrayView view;
  Managed managed;
};

template <typename Managed>
void delete_export(Managed* managed) {
  py::gil_scoped_acquire gil;
  delete static_cast<Export<Managed>*>(managed->manager);
}

template <typename Managed>
py::capsule make_capsule(const ArrayView& view, const char* name) {
  auto* exported = new Export<Managed>{view, {}};
  Managed& managed = exported->managed;
  managed.manager = exported;
  managed.deleter = delete_export<Managed>;
  managed.tensor = {.data = reinterpret_cast<void*>(view.address),
                    .device = {view.device.first, view.device.second},
                    .ndim = static_cast<int32_t>(view.shape.size()),
                    .dtype = dlpack_type(view.dtype),
                    .shape = exported->view.shape.data(),
                    .strides = exported->view.strides.data(),
                    .byte_offset = 0};
  if constexpr (std::is_same_v<Managed, dlpack::ManagedTensorVersioned>) {
    managed.version = {1, 0};
    managed.flags = 0;
  }
  return py::capsule(&managed, name, [](PyObject* capsule) {
    const char* current = PyCapsule_GetName(capsule);
    if (std::string_view(current).starts_with("used_")) return;  // the consumer frees it
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(capsule, current));
    unused->deleter(unused);
  });
}

py::capsule export_view(const ArrayView& view, const py::object& max_version) {
  if (!max_version.is_none() && max_version[py::int_(0)].cast<int>() >= 1) {
    return make_capsule<dlpack::ManagedTensorVersioned>(view, "dltensor_versioned");
  }
  return make_capsule<dlpack::ManagedTensor>(view, "dltensor");
}

}  // namespace

void register_memory(py::module_& module) {
  py::class_<Segment, std::shared_ptr<Segment>>(module, "Segment",
                                                "Page-aligned, zeroed memory without a name.")
      .def_static(
          "create",
          [](size_t num_bytes, bool shared) {
            return std::make_shared<Segment>(Segment::create(num_bytes, shared));
          },
          py::arg("num_bytes"), py::arg("shared"))
      .def_static(
          "attach",
          [](int fd, size_t num_bytes) {
            return std::make_shared<Segment>(Segment::attach(fd, num_bytes));
          },
          py::arg("fd"), py::arg("num_bytes"))
      .def_property_readonly(
          "address", [](const Segment& self) { return reinterpret_cast<uintptr_t>(self.data()); })
      .def_property_readonly("num_bytes", &Segment::size)
      .def_property_readonly("fd", &Segment::fd);

  py::class_<ArrayView>(module, "ArrayView", "Memory of a pool, exported through DLPack.")
      .def(py::init([](uintptr_t address, std::vector<int64_t> shape, std::vector<int64_t> strides,
                       const std::string& dtype, std::pair<int32_t, int32_t> device,
                       py::object owner) {
             KVLINK_CHECK(shape.size() == strides.size(), "strides: expected ", shape.size(),
                          " entries; got ", strides.size());
             return ArrayView{address, std::move(shape), std::move(strides), dtype_from_name(dtype),
                              device,  std::move(owner)};
           }),
           py::arg("address"), py::arg("shape"), py::arg("strides"), py::arg("dtype"),
           py::arg("device"), py::arg("owner"))
      .def(
          "__dlpack__",
          [](const ArrayView& self, const py::object&, const py::object& max_version,
             const py::object&, const py::object&) { return export_view(self, max_version); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const ArrayView& self) { return self.device; });

  module.def(
      "tensor_info",
      [](const py::object& object, const std::string& name) {
        const ConsumerStream addresses_alone(dlpack::kNoStreams);
        const Tensor tensor(object, name);
        return py::make_tuple(reinterpret_cast<uintptr_t>(tensor.data<void>()), tensor.shape(),
                              tensor.strides(), tensor.type_name(),
                              py::make_tuple(tensor.device().type, tensor.device().id),
                              tensor.read_only());
      },
      py::arg("object"), py::arg("name"),
      "(address, shape, strides in elements, dtype name, (device type, device id), read_only).");
}

}  // namespace kvlink::bindings
