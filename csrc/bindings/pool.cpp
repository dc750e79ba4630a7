#include "pool.hpp"

#include <pybind11/stl.h>

#include "kvlink/base/check.hpp"
#include "kvlink/layout/serialise.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

const LayerView& PoolView::layer(int64_t logical) const {
  KVLINK_CHECK(logical >= 0 && logical < static_cast<int64_t>(layer_map.size()),
               "layer: expected 0 to ", layer_map.size() - 1, "; got ", logical);
  return stored_layers[layer_map[logical]];
}

namespace {

// Addresses of element [0][0][0][0] of the planes k, v, k_scale and v_scale; 0 where there is none.
using PlaneAddresses = std::array<uintptr_t, 4>;

LayerView make_layer(const KVLayout& layout, const PlaneAddresses& planes, int64_t num_pages) {
  const bool has_v = layout.form != KVForm::kOpaque;
  KVLINK_CHECK(planes[0] != 0, "planes: K has no address");
  KVLINK_CHECK((planes[1] != 0) == has_v, "planes: V must have an address exactly when there is V");
  KVLINK_CHECK(
      (planes[2] != 0) == layout.has_scales() && (planes[3] != 0) == (has_v && layout.has_scales()),
      "planes: scales must have addresses exactly when the layout has scales");
  return {.layout = layout,
          .k = reinterpret_cast<void*>(planes[0]),
          .v = reinterpret_cast<void*>(planes[1]),
          .k_scale = reinterpret_cast<float*>(planes[2]),
          .v_scale = reinterpret_cast<float*>(planes[3]),
          .num_pages = num_pages};
}

PoolView make_pool(const py::bytes& layout_bytes, const std::vector<PlaneAddresses>& layers,
                   int64_t num_pages, const std::vector<int32_t>& layer_map,
                   std::pair<int32_t, int32_t> device, py::object owner) {
  const KVLayout layout = layout_from_bytes(std::string_view(layout_bytes));
  KVLINK_CHECK(num_pages > 0 && num_pages <= INT32_MAX, "num_pages: expected 1 to 2^31 - 1; got ",
               num_pages);
  KVLINK_CHECK(!layers.empty(), "layers: expected at least one");
  PoolView pool{.stored_layers = {},
                .layer_map = layer_map,
                .device = {device.first, device.second},
                .owner = std::move(owner)};
  for (const auto& planes : layers) {
    pool.stored_layers.push_back(make_layer(layout, planes, num_pages));
  }
  KVLINK_CHECK(!layer_map.empty(), "layer_map: expected at least one layer");
  for (int32_t stored : layer_map) {
    KVLINK_CHECK(stored >= 0 && stored < static_cast<int32_t>(layers.size()),
                 "layer_map: expected stored layers 0 to ", layers.size() - 1, "; got ", stored);
  }
  return pool;
}

}  // namespace

void register_pool(py::module_& module) {
  py::class_<KVLayout>(module, "Layout", "The C++ twin of kvlink.KVLayout.")
      .def(py::init(
               [](const py::bytes& bytes) { return layout_from_bytes(std::string_view(bytes)); }),
           py::arg("bytes"))
      .def("to_bytes",
           [](const KVLayout& self) {
             const auto bytes = layout_to_bytes(self);
             return py::bytes(bytes.data(), bytes.size());
           })
      .def("k_offset", &KVLayout::k_offset, py::arg("page"), py::arg("slot"), py::arg("head"),
           py::arg("dim"))
      .def("v_offset", &KVLayout::v_offset, py::arg("page"), py::arg("slot"), py::arg("head"),
           py::arg("dim"))
      .def("k_scale_offset", &KVLayout::k_scale_offset, py::arg("page"), py::arg("slot"),
           py::arg("head"))
      .def("v_scale_offset", &KVLayout::v_scale_offset, py::arg("page"), py::arg("slot"),
           py::arg("head"));

  py::class_<PoolView>(module, "PoolView", "A pool as the operators see it.")
      .def(py::init(&make_pool), py::arg("layout_bytes"), py::arg("layers"), py::arg("num_pages"),
           py::arg("layer_map"), py::arg("device"), py::arg("owner"));
}

}  // namespace kvlink::bindings
