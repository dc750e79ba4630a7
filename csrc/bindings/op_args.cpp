#include "op_args.hpp"

#include <pybind11/stl.h>

#include <algorithm>

#include "kvlink/base/check.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

// An id beyond int32 stays one that no pool has; it is an error only if the entry is used.
int32_t saturate(int64_t page) {
  return static_cast<int32_t>(std::clamp<int64_t>(page, INT32_MIN, INT32_MAX));
}

// Of Python or numpy; nothing is cut off.
int32_t exact_integer(const py::handle& value, const char* name) {
  py::detail::make_caster<int32_t> caster;
  KVLINK_CHECK(caster.load(value, false), name, ": expected an integer of 32 bits; got ",
               std::string(py::repr(value)));
  return py::detail::cast_op<int32_t>(caster);
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

RopeArgs::RopeArgs(const py::tuple& rope, Symbols& symbols, bool on_host)
    : cos_sin(TensorSpec{"rope.cos_sin",
                         {"num_positions", "rotary_dim"},
                         {"float32"},
                         TensorSpec::Strides::kLastContiguous,
                         false,
                         on_host}
                  .import(rope[0], symbols)),
      positions(TensorSpec{"rope.positions",
                           {"num_tokens"},
                           {"int64"},
                           TensorSpec::Strides::kContiguous,
                           false,
                           on_host}
                    .import(rope[1], symbols)) {
  params = {.cos_sin = cos_sin.data<float>(),
            .positions = positions.data<int64_t>(),
            .num_positions = cos_sin.dim(0),
            .stride_position = cos_sin.stride(0),
            .first_dim = exact_integer(rope[3], "rope.first_dim"),
            .rotary_dim = static_cast<int32_t>(cos_sin.dim(1)),
            .interleaved = rope[2].cast<bool>()};
}

AppendArgs::AppendArgs(const py::object& k, const py::object& v, const PoolView& pool,
                       const py::object& layers, const py::object& slots,
                       const py::object& rope_tuple) {
  const bool many = py::isinstance<py::sequence>(layers);
  const auto layer_ids =
      many ? layers.cast<std::vector<int64_t>>() : std::vector{layers.cast<int64_t>()};
  const KVLayout& layout = pool.layout();
  const bool on_host = pool.on_host();
  const bool has_v = layout.has_v_plane();
  const auto strides = TensorSpec::Strides::kLastContiguous;
  Symbols symbols;
  symbols.bind("num_layers", layer_ids.size(), "layer");
  symbols.bind("num_kv_heads", layout.num_kv_heads, "the pool");
  symbols.bind("head_dim", layout.head_dim, "the pool");
  symbols.bind("head_dim_v", layout.head_dim_v, "the pool");
  TensorSpec k_spec{"k",    {"num_tokens", "num_kv_heads", "head_dim"}, kFloatTypes, strides, false,
                    on_host};
  TensorSpec v_spec{
      "v", {"num_tokens", "num_kv_heads", "head_dim_v"}, kFloatTypes, strides, false, on_host};
  if (many) {
    k_spec.axes.insert(k_spec.axes.begin(), "num_layers");
    v_spec.axes.insert(v_spec.axes.begin(), "num_layers");
  }
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
  if (!rope_tuple.is_none()) rope.emplace(rope_tuple.cast<py::tuple>(), symbols, on_host);
  const auto check_device = [&](const char* names, const Tensor& array) {
    KVLINK_CHECK(
        on_host || (array.device().type == pool.device.type && array.device().id == pool.device.id),
        names, ": expected arrays on the pool's device, type ", pool.device.type, " number ",
        pool.device.id, "; got type ", array.device().type, " number ", array.device().id);
  };
  for (const Tensor& array : arrays) check_device("k, v, slots", array);
  if (rope) check_device("rope", rope->cos_sin), check_device("rope", rope->positions);
  // Of one layer.
  const auto data = [&](size_t array, size_t layer) {
    const Tensor& tensor = arrays[array];
    return tensor.data<char>() +
           (many ? layer * tensor.stride(0) : 0) * dtype_bytes(*tensor.dtype());
  };
  const size_t token = many ? 1 : 0, head = token + 1;
  for (size_t i = 0; i < layer_ids.size(); ++i) {
    params.push_back({.k = data(0, i),
                      .v = has_v ? data(1, i) : nullptr,
                      .slots = arrays.back().data<int64_t>(),
                      .num_tokens = arrays.back().dim(0),
                      .dtype = *keys.dtype(),
                      .k_stride_token = keys.stride(token),
                      .k_stride_head = keys.stride(head),
                      .v_stride_token = has_v ? arrays[1].stride(token) : 0,
                      .v_stride_head = has_v ? arrays[1].stride(head) : 0,
                      .kv = pool.layer(layer_ids[i]),
                      .rope = rope ? &rope->params : nullptr});
  }
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

ApplyRopeArgs::ApplyRopeArgs(const py::object& x_array, const py::object& out_array,
                             const py::object& rope_tuple, bool on_host)
    : x(TensorSpec{"x",
                   {"num_tokens", "num_heads", "head_dim"},
                   kFloatTypes,
                   TensorSpec::Strides::kLastContiguous,
                   false,
                   on_host}
            .import(x_array, symbols)),
      out(TensorSpec{"out",
                     {"num_tokens", "num_heads", "head_dim"},
                     {x.type_name() == "bfloat16"  ? "bfloat16"
                      : x.type_name() == "float16" ? "float16"
                                                   : "float32"},
                     TensorSpec::Strides::kLastContiguous,
                     true,
                     on_host}
              .import(out_array, symbols)),
      rope(rope_tuple.cast<py::tuple>(), symbols, on_host),
      params{.x = x.data<void>(),
             .out = out.data<void>(),
             .dtype = *x.dtype(),
             .x_stride_token = x.stride(0),
             .x_stride_head = x.stride(1),
             .out_stride_token = out.stride(0),
             .out_stride_head = out.stride(1),
             .num_tokens = x.dim(0),
             .num_heads = static_cast<int32_t>(x.dim(1)),
             .head_dim = static_cast<int32_t>(x.dim(2)),
             .rope = rope.params} {
  const dlpack::Device device = x.device();
  const std::pair<const char*, const Tensor*> others[] = {
      {"out", &out}, {"rope.cos_sin", &rope.cos_sin}, {"rope.positions", &rope.positions}};
  for (const auto& [name, array] : others) {
    const dlpack::Device other = array->device();
    KVLINK_CHECK(on_host || (other.type == device.type && other.id == device.id), name,
                 ": expected an array on the device of x, type ", device.type, " number ",
                 device.id, "; got type ", other.type, " number ", other.id);
  }
}

}  // namespace kvlink::bindings
