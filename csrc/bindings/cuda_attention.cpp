#include <pybind11/stl.h>

#include "cuda_module.hpp"
#include "kvlink/cuda/merge_states.hpp"
#include "kvlink/cuda/paged_attention.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

using Strides = TensorSpec::Strides;

// Imports arrays that must all be on one CUDA device.
class DeviceArrays {
 public:
  explicit DeviceArrays(dlpack::Device device) : device_(device) {}

  Tensor import(TensorSpec spec, const py::handle& object) {
    spec.host = false;
    const Tensor array = spec.import(object, sizes);
    KVLINK_CHECK(array.device().type == device_.type && array.device().id == device_.id, spec.name,
                 ": expected an array on CUDA device ", device_.id, "; got device type ",
                 array.device().type, " number ", array.device().id);
    return array;
  }
  std::optional<Tensor> import_optional(const TensorSpec& spec, const py::object& object) {
    if (object.is_none()) return std::nullopt;
    return import(spec, object);
  }

  Symbols sizes;

 private:
  dlpack::Device device_;
};

template <typename T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data<T>() : nullptr;
}

void paged_attention(const py::object& q, const PoolView& pool, int64_t layer,
                     const py::object& page_table, const py::object& seq_lens,
                     const py::object& q_indptr, const py::object& page_indptr, bool causal,
                     float scale, int64_t window, float softcap, const py::object& sinks,
                     const py::object& alibi_slopes, const py::object& out, const py::object& lse,
                     uintptr_t stream) {
  const DeviceGuard guard(pool);
  const LayerView& kv = pool.layer(layer);
  KVLINK_CHECK(window >= 0, "window: expected >= 0 (0: everything); got ", window);
  KVLINK_CHECK(softcap >= 0.0f, "softcap: expected >= 0 (0: none); got ", softcap);
  DeviceArrays arrays(pool.device);
  arrays.sizes.bind("head_dim", kv.layout.head_dim, "pool");
  arrays.sizes.bind("head_dim_v", kv.layout.head_dim_v, "pool");
  const Tensor q_in =
      arrays.import({"q", {"num_tokens", "num_q_heads", "head_dim"}, kFloatTypes}, q);
  const Tensor lens =
      arrays.import({"seq_lens", {"num_seqs"}, {"int32"}, Strides::kContiguous}, seq_lens);
  arrays.sizes.bind("num_seqs + 1", arrays.sizes["num_seqs"] + 1, "seq_lens");
  const auto q_starts = arrays.import_optional(
      {"q_indptr", {"num_seqs + 1"}, {"int32"}, Strides::kContiguous}, q_indptr);
  const auto page_starts = arrays.import_optional(
      {"page_indptr", {"num_seqs + 1"}, {"int32"}, Strides::kContiguous}, page_indptr);
  const TensorSpec dense{"page_table", {"num_seqs", "max_pages"}, {"int32"}};
  const TensorSpec csr{"page_table", {"num_entries"}, {"int32"}, Strides::kContiguous};
  const Tensor pages = arrays.import(page_starts ? csr : dense, page_table);
  const auto sink_logits =
      arrays.import_optional({"sinks", {"num_q_heads"}, {"float32"}, Strides::kContiguous}, sinks);
  const auto slopes = arrays.import_optional(
      {"alibi_slopes", {"num_q_heads"}, {"float32"}, Strides::kContiguous}, alibi_slopes);
  const std::string q_type = q_in.type_name();
  const Tensor out_array = arrays.import({"out",
                                          {"num_tokens", "num_q_heads", "head_dim_v"},
                                          {q_type.c_str()},
                                          Strides::kLastContiguous,
                                          true},
                                         out);
  const auto lse_array = arrays.import_optional(
      {"lse", {"num_tokens", "num_q_heads"}, {"float32"}, Strides::kContiguous, true}, lse);
  PagedAttentionParams params;
  params.q = q_in.data<void>();
  params.out = out_array.data<void>();
  params.lse = data_or_null<float>(lse_array);
  params.q_dtype = *q_in.dtype();
  params.q_stride_token = q_in.stride(0);
  params.q_stride_head = q_in.stride(1);
  params.out_stride_token = out_array.stride(0);
  params.out_stride_head = out_array.stride(1);
  params.q_indptr = data_or_null<int32_t>(q_starts);
  params.seq_lens = lens.data<int32_t>();
  params.page_table = pages.data<int32_t>();
  params.page_indptr = data_or_null<int32_t>(page_starts);
  params.num_entries = pages.dim(page_starts ? 0 : 1);
  params.page_table_stride = pages.stride(0);
  params.num_seqs = lens.dim(0);
  params.num_tokens = q_in.dim(0);
  params.num_q_heads = static_cast<int32_t>(q_in.dim(1));
  params.kv = kv;
  params.scale = scale;
  params.causal = causal;
  params.window = window;
  params.softcap = softcap;
  params.sinks = data_or_null<float>(sink_logits);
  params.alibi_slopes = data_or_null<float>(slopes);
  const py::gil_scoped_release nogil;
  cuda::paged_attention(params, as_stream(stream));
}

void merge_states(const std::vector<py::object>& outs, const std::vector<py::object>& lses,
                  const py::object& out, const py::object& lse, uintptr_t stream) {
  KVLINK_CHECK(!outs.empty() && outs.size() == lses.size(),
               "states: expected one lse for each of at least one out; got ", outs.size(),
               " outs and ", lses.size(), " lses");
  const dlpack::Device device = Tensor(outs[0], "outs[0]").device();
  KVLINK_CHECK(device.type == dlpack::kDeviceCuda,
               "outs[0]: expected an array on a CUDA device; got device type ", device.type);
  const DeviceGuard guard(device.id);
  DeviceArrays arrays(device);
  std::vector<Tensor> kept;
  std::vector<const void*> out_data;
  std::vector<const float*> lse_data;
  std::string type;
  for (size_t i = 0; i < outs.size(); ++i) {
    const std::string out_name = concat("outs[", i, "]"), lse_name = concat("lses[", i, "]");
    kept.push_back(
        arrays.import({out_name.c_str(),
                       {"num_tokens", "num_heads", "head_dim"},
                       type.empty() ? kFloatTypes : std::vector<const char*>{type.c_str()},
                       Strides::kContiguous},
                      outs[i]));
    type = kept.back().type_name();
    out_data.push_back(kept.back().data<void>());
    kept.push_back(arrays.import(
        {lse_name.c_str(), {"num_tokens", "num_heads"}, {"float32"}, Strides::kContiguous},
        lses[i]));
    lse_data.push_back(kept.back().data<float>());
  }
  const Tensor merged = arrays.import(
      {"out", {"num_tokens", "num_heads", "head_dim"}, {type.c_str()}, Strides::kContiguous, true},
      out);
  const Tensor merged_lse = arrays.import(
      {"lse", {"num_tokens", "num_heads"}, {"float32"}, Strides::kContiguous, true}, lse);
  const MergeStatesParams params{.outs = out_data.data(),
                                 .lses = lse_data.data(),
                                 .num_states = static_cast<int64_t>(out_data.size()),
                                 .out = merged.data<void>(),
                                 .lse = merged_lse.data<float>(),
                                 .dtype = *merged.dtype(),
                                 .num_tokens = merged.dim(0),
                                 .num_heads = static_cast<int32_t>(merged.dim(1)),
                                 .head_dim = static_cast<int32_t>(merged.dim(2))};
  const py::gil_scoped_release nogil;
  cuda::merge_states(params, as_stream(stream));
}

}  // namespace

void register_cuda_attention(py::module_& module) {
  module.def("paged_attention", &paged_attention, py::arg("q"), py::arg("pool"), py::arg("layer"),
             py::arg("page_table"), py::arg("seq_lens"), py::arg("q_indptr"),
             py::arg("page_indptr"), py::arg("causal"), py::arg("scale"), py::arg("window"),
             py::arg("softcap"), py::arg("sinks"), py::arg("alibi_slopes"), py::arg("out"),
             py::arg("lse"), py::arg("stream"),
             "See kvlink.paged_attention; window 0 and softcap 0 mean none.");
  module.def("merge_states", &merge_states, py::arg("outs"), py::arg("lses"), py::arg("out"),
             py::arg("lse"), py::arg("stream"), "See kvlink.merge_states.");
}

}  // namespace kvlink::bindings
