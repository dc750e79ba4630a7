#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/append_kv.hpp"
#include "kvlink/cpu/digest_pages.hpp"
#include "kvlink/cpu/relayout_pages.hpp"
#include "kvlink/cpu/rope.hpp"
#include "op_args.hpp"
#include "pool.hpp"
#include "register.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

void check_host(const PoolView& pool, const char* name) {
  KVLINK_CHECK(
      pool.device.type == dlpack::kDeviceCpu || pool.device.type == dlpack::kDeviceCudaHost, name,
      ": expected a pool in host memory; got device type ", pool.device.type);
}

void append_kv(const py::object& k, const py::object& v, const PoolView& pool,
               const py::object& layers, const py::object& slots, const py::object& rope) {
  check_host(pool, "pool");
  const AppendArgs args(k, v, pool, layers, slots, rope);
  const py::gil_scoped_release release;
  cpu::append_kv(args.params);
}

void apply_rope(const py::object& x, const py::object& out, const py::object& rope) {
  const ApplyRopeArgs args(x, out, rope, true);
  const py::gil_scoped_release release;
  cpu::apply_rope(args.params);
}

py::tuple relayout_pages(const PoolView& src, const PageIds& src_pages, const PoolView& dst,
                         const PageIds& dst_pages, const std::vector<int32_t>& src_layers,
                         const std::vector<int32_t>& dst_layers,
                         const std::vector<int32_t>& model_layers, int32_t num_heads,
                         int32_t src_head, int32_t dst_head, int32_t model_head, int64_t num_tokens,
                         int64_t src_start, int64_t dst_start, int64_t token_position,
                         bool digest) {
  check_host(src, "src_pool");
  check_host(dst, "dst_pool");
  const auto from = stored_layers(src, src_layers, "src_layers");
  const auto to = stored_layers(dst, dst_layers, "dst_layers");
  KVLINK_CHECK(from.size() == to.size() && from.size() == model_layers.size(),
               "dst_layers: expected ", from.size(), " layers; got ", to.size());
  const RelayoutParams params{.src_layers = from.data(),
                              .dst_layers = to.data(),
                              .model_layers = model_layers.data(),
                              .num_layers = static_cast<int32_t>(from.size()),
                              .num_heads = num_heads,
                              .src_head = src_head,
                              .dst_head = dst_head,
                              .model_head = model_head,
                              .src = src_pages.run(src_start),
                              .dst = dst_pages.run(dst_start),
                              .num_tokens = num_tokens,
                              .token_position = token_position,
                              .with_digest = digest};
  RelayoutResult result;
  {
    const py::gil_scoped_release release;
    result = cpu::relayout_pages(params);
  }
  return py::make_tuple(result.rows, result.digest);
}

py::tuple digest_pages(const PoolView& pool, const PageIds& pages,
                       const std::vector<int32_t>& layers, const std::vector<int32_t>& model_layers,
                       int32_t num_heads, int32_t head, int32_t model_head, int64_t num_tokens,
                       int64_t start, int64_t token_position) {
  check_host(pool, "pool");
  const auto views = stored_layers(pool, layers, "layers");
  KVLINK_CHECK(views.size() == model_layers.size(), "model_layers: expected ", views.size(),
               " layers; got ", model_layers.size());
  const DigestParams params{.layers = views.data(),
                            .model_layers = model_layers.data(),
                            .num_layers = static_cast<int32_t>(views.size()),
                            .num_heads = num_heads,
                            .head = head,
                            .model_head = model_head,
                            .run = pages.run(start),
                            .num_tokens = num_tokens,
                            .token_position = token_position};
  RelayoutResult result;
  {
    const py::gil_scoped_release release;
    result = cpu::digest_pages(params);
  }
  return py::make_tuple(result.rows, result.digest);
}

}  // namespace

void register_cache_ops(py::module_& module) {
  py::class_<PageIds>(module, "PageIds", "Page ids, int32: an array without a copy, or a sequence.")
      .def(py::init<const py::object&, const std::string&>(), py::arg("pages"), py::arg("name"))
      .def("__len__", &PageIds::size);
  module.def("append_kv", &append_kv, py::arg("k"), py::arg("v"), py::arg("pool"),
             py::arg("layers"), py::arg("slots"), py::arg("rope") = py::none(),
             "`layers`: one layer or a sequence; `rope`: a kvlink.Rope or None.");
  module.def("apply_rope", &apply_rope, py::arg("x"), py::arg("out"), py::arg("rope"));
  module.def("relayout_pages", &relayout_pages, py::kw_only(), py::arg("src"), py::arg("src_pages"),
             py::arg("dst"), py::arg("dst_pages"), py::arg("src_layers"), py::arg("dst_layers"),
             py::arg("model_layers"), py::arg("num_heads"), py::arg("src_head"),
             py::arg("dst_head"), py::arg("model_head"), py::arg("num_tokens").noconvert(),
             py::arg("src_start").noconvert(), py::arg("dst_start").noconvert(),
             py::arg("token_position").noconvert(), py::arg("digest"),
             "(rows, digest). Layers are stored layers.");
  module.def("digest_pages", &digest_pages, py::kw_only(), py::arg("pool"), py::arg("pages"),
             py::arg("layers"), py::arg("model_layers"), py::arg("num_heads"), py::arg("head"),
             py::arg("model_head"), py::arg("num_tokens").noconvert(), py::arg("start").noconvert(),
             py::arg("token_position").noconvert(), "(rows, digest). Layers are stored layers.");
}

}  // namespace kvlink::bindings
