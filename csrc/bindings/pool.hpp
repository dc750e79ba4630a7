// A pool as the operators see it: the layers' addresses, and what keeps them alive.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "kvlink/layout/kv_layout.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

// Bound as kvlink._C.PoolView; kvlink.KVPool owns one.
struct PoolView {
  std::vector<LayerView> stored_layers;
  std::vector<int32_t> layer_map;  // logical layer -> stored layer
  dlpack::Device device;
  pybind11::object owner;  // whatever holds the memory

  bool on_host() const {
    return device.type == dlpack::kDeviceCpu || device.type == dlpack::kDeviceCudaHost;
  }
  const KVLayout& layout() const { return stored_layers.front().layout; }
  // The stored layer behind a logical one. Throws InvalidArgument.
  const LayerView& layer(int64_t logical) const;
};

}  // namespace kvlink::bindings
