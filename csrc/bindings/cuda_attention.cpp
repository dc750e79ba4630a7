#include <pybind11/stl.h>

#include <deque>

#include "cuda_module.hpp"
#include "kvlink/cuda/merge_states.hpp"
#include "kvlink/cuda/paged_attention.hpp"
#include "kvlink/cuda/paged_attention_sm90.hpp"
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

// The arrays of a call stay imported until it is queued.
struct Call {
  explicit Call(const PoolView& pool) : arrays(pool.device) {}

  template <typename T>
  const T* vector(const char* name, const char* size, std::vector<const char*> dtypes,
                  const py::object& array) {
    const auto tensor =
        arrays.import_optional({name, {size}, std::move(dtypes), Strides::kContiguous}, array);
    if (!tensor) return nullptr;
    kept.push_back(*tensor);
    return tensor->data<T>();
  }
  const Tensor& import(const TensorSpec& spec, const py::object& array) {
    kept.push_back(arrays.import(spec, array));
    return kept.back();
  }

  DeviceArrays arrays;
  std::deque<Tensor> kept;
};

void import_table(Call& call, PagedAttentionParams& p, const py::object& page_table,
                  const py::object& page_indptr, const py::object& generations,
                  const py::object& expected) {
  p.page_indptr = call.vector<int32_t>("page_indptr", "num_seqs + 1", {"int32"}, page_indptr);
  const auto spec = [&](const char* name, std::vector<const char*> dtypes) -> TensorSpec {
    if (p.page_indptr) return {name, {"num_entries"}, std::move(dtypes), Strides::kContiguous};
    return {name, {"num_seqs", "max_pages"}, std::move(dtypes)};
  };
  const Tensor& pages = call.import(spec("page_table", {"int32"}), page_table);
  p.page_table = pages.data<int32_t>();
  p.num_entries = pages.dim(p.page_indptr ? 0 : 1);
  p.page_table_stride = pages.stride(0);
  if (generations.is_none()) return;
  const std::vector<const char*> types = {"uint32", "int32"};
  call.arrays.sizes.bind("num_pages", p.kv.num_pages, "pool");
  p.generations = call.vector<uint32_t>("page_generations", "num_pages", types, generations);
  const Tensor& wanted = call.import(spec("expected_generations", types), expected);
  p.expected_generations = wanted.data<uint32_t>();
  p.expected_stride = wanted.stride(0);
}

void paged_attention(const py::object& q, const PoolView& pool, int64_t layer,
                     const py::object& page_table, const py::object& seq_lens,
                     const py::object& q_indptr, const py::object& page_indptr, bool causal,
                     float scale, int64_t window, float softcap, const py::object& sinks,
                     const py::object& alibi_slopes, const py::object& out, const py::object& lse,
                     const py::object& q_positions, const py::object& mask,
                     const py::object& mask_starts, const py::object& generations,
                     const py::object& expected_generations, const ReadyItems& ready,
                     double ready_timeout, uintptr_t stream) {
  const DeviceGuard guard(pool);
  const ConsumerStream consumer(static_cast<int64_t>(stream));
  const LayerView& kv = pool.layer(layer);
  KVLINK_CHECK(window >= 0, "window: expected >= 0 (0: everything); got ", window);
  KVLINK_CHECK(softcap >= 0.0f, "softcap: expected >= 0 (0: none); got ", softcap);
  Call call(pool);
  Symbols& sizes = call.arrays.sizes;
  sizes.bind("head_dim", kv.layout.head_dim, "pool");
  sizes.bind("head_dim_v", kv.layout.head_dim_v, "pool");
  PagedAttentionParams p;
  p.kv = kv;
  const Tensor& q_in =
      call.import({"q", {"num_tokens", "num_q_heads", "head_dim"}, kFloatTypes}, q);
  p.q = q_in.data<void>();
  p.q_dtype = *q_in.dtype();
  p.q_stride_token = q_in.stride(0);
  p.q_stride_head = q_in.stride(1);
  p.num_tokens = q_in.dim(0);
  p.num_q_heads = static_cast<int32_t>(q_in.dim(1));
  const Tensor& lens =
      call.import({"seq_lens", {"num_seqs"}, {"int32"}, Strides::kContiguous}, seq_lens);
  p.seq_lens = lens.data<int32_t>();
  p.num_seqs = lens.dim(0);
  sizes.bind("num_seqs + 1", p.num_seqs + 1, "seq_lens");
  p.q_indptr = call.vector<int32_t>("q_indptr", "num_seqs + 1", {"int32"}, q_indptr);
  import_table(call, p, page_table, page_indptr, generations, expected_generations);
  p.q_positions = call.vector<int32_t>("q_positions", "num_tokens", {"int32"}, q_positions);
  p.sinks = call.vector<float>("sinks", "num_q_heads", {"float32"}, sinks);
  p.alibi_slopes = call.vector<float>("alibi_slopes", "num_q_heads", {"float32"}, alibi_slopes);
  if (!mask.is_none()) {
    const Tensor& bits = call.import({"mask", {"num_tokens", "mask_bytes"}, {"uint8"}}, mask);
    p.mask = bits.data<uint8_t>();
    p.mask_stride = bits.stride(0);
    p.mask_bytes = bits.dim(1);
    p.mask_starts = call.vector<int32_t>("mask_starts", "num_seqs", {"int32"}, mask_starts);
  }
  const std::string q_type = q_in.type_name();
  const Tensor& out_array = call.import({"out",
                                         {"num_tokens", "num_q_heads", "head_dim_v"},
                                         {q_type.c_str()},
                                         Strides::kLastContiguous,
                                         true},
                                        out);
  p.out = out_array.data<void>();
  p.out_stride_token = out_array.stride(0);
  p.out_stride_head = out_array.stride(1);
  if (!lse.is_none()) {
    p.lse =
        call.import({"lse", {"num_tokens", "num_q_heads"}, {"float32"}, Strides::kContiguous, true},
                    lse)
            .data<float>();
  }
  p.scale = scale;
  p.causal = causal;
  p.window = window;
  p.softcap = softcap;
  const cuda::ReadyCounters counters = ready_counters(ready, ready_timeout, pool.device);
  const py::gil_scoped_release nogil;
  cuda::paged_attention(p, counters, as_stream(stream));
}

void merge_states(const std::vector<py::object>& outs, const std::vector<py::object>& lses,
                  const py::object& out, const py::object& lse, uintptr_t stream) {
  KVLINK_CHECK(!outs.empty() && outs.size() == lses.size(),
               "states: expected one lse for each of at least one out; got ", outs.size(),
               " outs and ", lses.size(), " lses");
  dlpack::Device device;
  {
    const ConsumerStream device_alone(dlpack::kNoStreams);
    device = Tensor(outs[0], "outs[0]").device();
  }
  KVLINK_CHECK(device.type == dlpack::kDeviceCuda,
               "outs[0]: expected an array on a CUDA device; got device type ", device.type);
  const DeviceGuard guard(device.id);
  const ConsumerStream consumer(static_cast<int64_t>(stream));
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
             py::arg("lse"), py::arg("q_positions"), py::arg("mask"), py::arg("mask_starts"),
             py::arg("page_generations"), py::arg("expected_generations"), py::arg("ready"),
             py::arg("ready_timeout"), py::arg("stream"),
             "See kvlink.paged_attention; window 0 and softcap 0 mean none.");
  module.def("set_prefill", &cuda::set_prefill, py::arg("name"),
             "For tests and measurements: the kernel of long prompts, for the whole process.\n\n"
             "auto; mma.sync; wgmma (sm_90a; for few rows, too) or \"wgmma, two parts\" (of each\n"
             "weight: slower, and as close as float32 sums).");
  module.def("last_prefill", &cuda::last_prefill,
             "What this thread's last call with q_indptr took for sequences of many rows.\n\n"
             "wgmma, or \"mma.sync: \" and why.");
  module.def("merge_states", &merge_states, py::arg("outs"), py::arg("lses"), py::arg("out"),
             py::arg("lse"), py::arg("stream"), "See kvlink.merge_states.");
}

}  // namespace kvlink::bindings
