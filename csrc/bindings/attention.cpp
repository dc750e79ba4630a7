#include <pybind11/stl.h>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/merge_states.hpp"
#include "kvlink/cpu/paged_attention.hpp"
#include "pool.hpp"
#include "readiness.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace {

using Strides = TensorSpec::Strides;

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data<T>() : nullptr;
}

void paged_attention(const py::object& q, const PoolView& pool, int64_t layer,
                     const py::object& page_table, const py::object& seq_lens,
                     const py::object& q_indptr, const py::object& page_indptr, bool causal,
                     float scale, int64_t window, float softcap, const py::object& sinks,
                     const py::object& alibi_slopes, const py::object& out, const py::object& lse,
                     const ReadyItems& ready, double ready_timeout) {
  KVLINK_CHECK(pool.device.type == dlpack::kDeviceCpu,
               "pool: expected host memory; got device type ", pool.device.type);
  const LayerView& kv = pool.layer(layer);
  Symbols sizes;
  sizes.bind("head_dim", kv.layout.head_dim, "pool");
  sizes.bind("head_dim_v", kv.layout.head_dim_v, "pool");
  const Tensor q_in =
      TensorSpec{"q", {"num_tokens", "num_q_heads", "head_dim"}, kFloatTypes}.import(q, sizes);
  const Tensor lens =
      TensorSpec{"seq_lens", {"num_seqs"}, {"int32"}, Strides::kContiguous}.import(seq_lens, sizes);
  sizes.bind("num_seqs + 1", sizes["num_seqs"] + 1, "seq_lens");
  const auto q_starts =
      TensorSpec{"q_indptr", {"num_seqs + 1"}, {"int32"}, Strides::kContiguous}.import_optional(
          q_indptr, sizes);
  const auto page_starts =
      TensorSpec{"page_indptr", {"num_seqs + 1"}, {"int32"}, Strides::kContiguous}.import_optional(
          page_indptr, sizes);
  const TensorSpec dense{"page_table", {"num_seqs", "max_pages"}, {"int32"}};
  const TensorSpec csr{"page_table", {"num_entries"}, {"int32"}, Strides::kContiguous};
  const Tensor pages = (page_starts ? csr : dense).import(page_table, sizes);
  const TensorSpec per_head{"sinks", {"num_q_heads"}, {"float32"}, Strides::kContiguous};
  const auto sink_logits = per_head.import_optional(sinks, sizes);
  TensorSpec slopes_spec = per_head;
  slopes_spec.name = "alibi_slopes";
  const auto slopes = slopes_spec.import_optional(alibi_slopes, sizes);
  TensorSpec out_spec{"out", {"num_tokens", "num_q_heads", "head_dim_v"}, {}};
  const std::string q_type = q_in.type_name();
  out_spec.dtypes = {q_type.c_str()};
  out_spec.writable = true;
  const Tensor out_array = out_spec.import(out, sizes);
  TensorSpec lse_spec{"lse", {"num_tokens", "num_q_heads"}, {"float32"}, Strides::kContiguous};
  lse_spec.writable = true;
  const auto lse_array = lse_spec.import_optional(lse, sizes);

  const auto awaited = to_readiness(ready);
  const PagedAttentionParams params{
      .q = q_in.data<void>(),
      .out = out_array.data<void>(),
      .lse = lse_array ? lse_array->data<float>() : nullptr,
      .q_dtype = *q_in.dtype(),
      .q_stride_token = q_in.stride(0),
      .q_stride_head = q_in.stride(1),
      .out_stride_token = out_array.stride(0),
      .out_stride_head = out_array.stride(1),
      .q_indptr = data_or_null<int32_t>(q_starts),
      .seq_lens = lens.data<int32_t>(),
      .page_table = pages.data<int32_t>(),
      .page_indptr = data_or_null<int32_t>(page_starts),
      .num_entries = pages.dim(page_starts ? 0 : 1),
      .page_table_stride = pages.stride(0),
      .num_seqs = lens.dim(0),
      .num_tokens = q_in.dim(0),
      .num_q_heads = static_cast<int32_t>(q_in.dim(1)),
      .kv = kv,
      .scale = scale,
      .causal = causal,
      .window = window,
      .softcap = softcap,
      .sinks = data_or_null<float>(sink_logits),
      .alibi_slopes = data_or_null<float>(slopes),
      .ready = make_wait(awaited, ready_timeout),
  };
  py::gil_scoped_release nogil;
  cpu::paged_attention(params);
}

void merge_states(const std::vector<py::object>& outs, const std::vector<py::object>& lses,
                  const py::object& out, const py::object& lse) {
  KVLINK_CHECK(!outs.empty() && outs.size() == lses.size(),
               "states: expected one lse for each of at least one out; got ", outs.size(),
               " outs and ", lses.size(), " lses");
  Symbols sizes;
  std::vector<Tensor> arrays;
  std::vector<const void*> out_data;
  std::vector<const float*> lse_data;
  std::string type;
  for (size_t i = 0; i < outs.size(); ++i) {
    const std::string out_name = concat("outs[", i, "]"), lse_name = concat("lses[", i, "]");
    const TensorSpec out_spec{out_name.c_str(),
                              {"num_tokens", "num_heads", "head_dim"},
                              type.empty() ? kFloatTypes : std::vector<const char*>{type.c_str()},
                              Strides::kContiguous};
    arrays.push_back(out_spec.import(outs[i], sizes));
    type = arrays.back().type_name();
    out_data.push_back(arrays.back().data<void>());
    const TensorSpec lse_spec{
        lse_name.c_str(), {"num_tokens", "num_heads"}, {"float32"}, Strides::kContiguous};
    arrays.push_back(lse_spec.import(lses[i], sizes));
    lse_data.push_back(arrays.back().data<float>());
  }
  TensorSpec out_spec{
      "out", {"num_tokens", "num_heads", "head_dim"}, {type.c_str()}, Strides::kContiguous, true};
  TensorSpec lse_spec{"lse", {"num_tokens", "num_heads"}, {"float32"}, Strides::kContiguous, true};
  const Tensor merged = out_spec.import(out, sizes), merged_lse = lse_spec.import(lse, sizes);
  const MergeStatesParams params{.outs = out_data.data(),
                                 .lses = lse_data.data(),
                                 .num_states = static_cast<int64_t>(out_data.size()),
                                 .out = merged.data<void>(),
                                 .lse = merged_lse.data<float>(),
                                 .dtype = *merged.dtype(),
                                 .num_tokens = merged.dim(0),
                                 .num_heads = static_cast<int32_t>(merged.dim(1)),
                                 .head_dim = static_cast<int32_t>(merged.dim(2))};
  py::gil_scoped_release nogil;
  cpu::merge_states(params);
}

}  // namespace

void register_attention(py::module_& module) {
  module.def("paged_attention", &paged_attention, py::arg("q"), py::arg("pool"), py::arg("layer"),
             py::arg("page_table"), py::arg("seq_lens"), py::arg("q_indptr"),
             py::arg("page_indptr"), py::arg("causal"), py::arg("scale"), py::arg("window"),
             py::arg("softcap"), py::arg("sinks"), py::arg("alibi_slopes"), py::arg("out"),
             py::arg("lse"), py::arg("ready") = py::tuple(), py::arg("ready_timeout") = 0.0,
             "See kvlink.paged_attention; window 0 and softcap 0 mean none.");
  module.def("merge_states", &merge_states, py::arg("outs"), py::arg("lses"), py::arg("out"),
             py::arg("lse"), "See kvlink.merge_states.");
}

}  // namespace kvlink::bindings
