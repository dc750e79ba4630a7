#include "op_args.hpp"

#include <algorithm>

#include "kvlink/base/check.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

// An id beyond int32 stays one that no pool has; it is an error only if the entry is used.
int32_t saturate(int64_t page) {
  return static_cast<int32_t>(std::clamp<int64_t>(page, INT32_MIN, INT32_MAX));
}

}  // namespace

PageIds::PageIds(const py::object& pages, const std::string& name) {
  if (py::hasattr(pages, "__dlpack__")) {
    Symbols symbols;
    array_ = TensorSpec{name.c_str(), {"num_pages"}, {"int32", "int64"}, TensorSpec::Strides::kAny}
                 .import(pages, symbols);
    size_ = array_->dim(0);
    if (array_->type_name() == "int32" && array_->is_contiguous()) {
      data_ = array_->data<int32_t>();
      return;
    }
    copied_.reserve(size_);
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t at = i * array_->stride(0);
      copied_.push_back(array_->type_name() == "int32" ? array_->data<int32_t>()[at]
                                                       : saturate(array_->data<int64_t>()[at]));
    }
  } else {
    for (const py::handle& page : py::reinterpret_borrow<py::object>(pages)) {
      try {
        copied_.push_back(saturate(page.cast<int64_t>()));
      } catch (const py::cast_error&) {
        throw InvalidArgument(concat(name, "[", copied_.size(), "]: expected an integer; got ",
                                     std::string(py::repr(page))));
      }
    }
    size_ = copied_.size();
  }
  data_ = copied_.data();
}

AppendArgs::AppendArgs(const py::object& k, const py::object& v, const PoolView& pool,
                       int64_t layer, const py::object& slots) {
  const LayerView& kv = pool.layer(layer);
  const KVLayout& layout = kv.layout;
  const bool on_host = pool.on_host();
  const bool has_v = layout.has_v_plane();
  const auto strides = TensorSpec::Strides::kLastContiguous;
  Symbols symbols;
  symbols.bind("num_kv_heads", layout.num_kv_heads, "the pool");
  symbols.bind("head_dim", layout.head_dim, "the pool");
  symbols.bind("head_dim_v", layout.head_dim_v, "the pool");
  const TensorSpec k_spec{
      "k", {"num_tokens", "num_kv_heads", "head_dim"}, kFloatTypes, strides, false, on_host};
  const TensorSpec v_spec{
      "v", {"num_tokens", "num_kv_heads", "head_dim_v"}, kFloatTypes, strides, false, on_host};
  const TensorSpec slots_spec{"slots", {"num_tokens"}, {"int64"}, TensorSpec::Strides::kContiguous,
                              false,   on_host};
  const Tensor keys = k_spec.import(k, symbols);
  arrays.push_back(keys);
  KVLINK_CHECK(has_v || v.is_none(), "v: expected None, as V is part of K in latent pages");
  if (has_v) {
    arrays.push_back(v_spec.import(v, symbols));
    KVLINK_CHECK(arrays[1].dtype() == keys.dtype(), "v: expected dtype ", keys.type_name(),
                 " as in k; got ", arrays[1].type_name());
  }
  arrays.push_back(slots_spec.import(slots, symbols));
  for (const Tensor& array : arrays) {
    KVLINK_CHECK(
        on_host || (array.device().type == pool.device.type && array.device().id == pool.device.id),
        "k, v, slots: expected arrays on the pool's device, type ", pool.device.type, " number ",
        pool.device.id, "; got type ", array.device().type, " number ", array.device().id);
  }
  const Tensor* values = has_v ? &arrays[1] : nullptr;
  params = {.k = keys.data<void>(),
            .v = values ? values->data<void>() : nullptr,
            .slots = arrays.back().data<int64_t>(),
            .num_tokens = arrays.back().dim(0),
            .dtype = *keys.dtype(),
            .k_stride_token = keys.stride(0),
            .k_stride_head = keys.stride(1),
            .v_stride_token = values ? values->stride(0) : 0,
            .v_stride_head = values ? values->stride(1) : 0,
            .kv = kv};
}

std::vector<LayerView> stored_layers(const PoolView& pool, const std::vector<int32_t>& layers,
                                     const char* name) {
  std::vector<LayerView> views;
  for (const int32_t layer : layers) {
    KVLINK_CHECK(layer >= 0 && layer < static_cast<int64_t>(pool.stored_layers.size()), name,
                 ": expected stored layers 0 to ", pool.stored_layers.size() - 1, "; got ", layer);
    views.push_back(pool.stored_layers[layer]);
  }
  return views;
}

}  // namespace kvlink::bindings
