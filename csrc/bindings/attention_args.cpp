#include "attention_args.hpp"

#include <cmath>

#include "kvlink/base/check.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

using Strides = TensorSpec::Strides;

const std::vector<const char*> kGenerationTypes = {"uint32", "int32"};

// Some element of q is one of out, too. False for views that take turns in one buffer, and where
// that cannot be told (strides that differ, or are not nested).
bool overlap(const Tensor& q, const Tensor& out) {
  const auto shared_stride = [&](size_t axis) {
    return q.stride(axis) == out.stride(axis) && q.stride(axis) > 0 ? q.stride(axis) : 0;
  };
  const auto steps_below = [](int64_t distance, int64_t stride) {
    return stride ? distance / stride - (distance % stride < 0) : 0;
  };
  const auto within = [](int64_t steps, int64_t size) { return -size < steps && steps < size; };
  const int64_t distance = (out.data<char>() - q.data<char>()) / dtype_bytes(*q.dtype());
  const int64_t token_stride = shared_stride(0), head_stride = shared_stride(1);
  for (const int64_t token : {0, 1}) {
    const int64_t tokens = steps_below(distance, token_stride) + token;
    const int64_t in_token = distance - tokens * token_stride;
    for (const int64_t head : {0, 1}) {
      const int64_t heads = steps_below(in_token, head_stride) + head;
      const int64_t dims = in_token - heads * head_stride;
      if (within(tokens, q.dim(0)) && within(heads, q.dim(1)) && -out.dim(2) < dims &&
          dims < q.dim(2)) {
        return true;
      }
    }
  }
  return false;
}

}  // namespace

const Tensor& DeviceArrays::import(TensorSpec spec, const py::object& array) {
  spec.host = device_.type != dlpack::kDeviceCuda;
  const Tensor& tensor = kept_.emplace_back(spec.import(array, sizes));
  const dlpack::Device& at = tensor.device();
  KVLINK_CHECK(spec.host || (at.type == device_.type && at.id == device_.id), spec.name,
               ": expected an array on CUDA device ", device_.id, "; got device type ", at.type,
               " number ", at.id);
  return tensor;
}

AttentionBatch::AttentionBatch(const PoolView& pool, int64_t layer, const py::object& page_table,
                               const py::object& seq_lens, const py::object& q_indptr,
                               const py::object& page_indptr)
    : arrays(pool.device) {
  params.kv = pool.layer(layer);
  arrays.sizes.bind("head_dim", params.kv.layout.head_dim, "pool");
  arrays.sizes.bind("head_dim_v", params.kv.layout.head_dim_v, "pool");
  const Tensor& lens =
      arrays.import({"seq_lens", {"num_seqs"}, {"int32"}, Strides::kContiguous}, seq_lens);
  params.seq_lens = lens.data<int32_t>();
  params.num_seqs = lens.dim(0);
  arrays.sizes.bind("num_seqs + 1", params.num_seqs + 1, "seq_lens");
  params.q_indptr = arrays.vector<int32_t>("q_indptr", "num_seqs + 1", {"int32"}, q_indptr);
  params.page_indptr =
      arrays.vector<int32_t>("page_indptr", "num_seqs + 1", {"int32"}, page_indptr);
  const Tensor& pages = arrays.import(table_spec("page_table", {"int32"}), page_table);
  params.page_table = pages.data<int32_t>();
  params.num_entries = pages.dim(params.page_indptr ? 0 : 1);
  params.page_table_stride = pages.stride(0);
}

TensorSpec AttentionBatch::table_spec(const char* name, std::vector<const char*> dtypes) const {
  if (params.page_indptr) return {name, {"num_entries"}, std::move(dtypes), Strides::kContiguous};
  return {name, {"num_seqs", "max_pages"}, std::move(dtypes)};
}

void import_attention(AttentionBatch& batch, const AttentionObjects& objects) {
  DeviceArrays& arrays = batch.arrays;
  PagedAttentionParams& p = batch.params;
  const Tensor& q =
      arrays.import({"q", {"num_tokens", "num_q_heads", "head_dim"}, kFloatTypes}, objects.q);
  p.q = q.data<void>();
  p.q_dtype = *q.dtype();
  p.q_stride_token = q.stride(0);
  p.q_stride_head = q.stride(1);
  p.num_tokens = q.dim(0);
  p.num_q_heads = static_cast<int32_t>(q.dim(1));
  p.q_positions =
      arrays.vector<int32_t>("q_positions", "num_tokens", {"int32"}, objects.q_positions);
  p.sinks = arrays.vector<float>("sinks", "num_q_heads", {"float32"}, objects.sinks);
  p.alibi_slopes =
      arrays.vector<float>("alibi_slopes", "num_q_heads", {"float32"}, objects.alibi_slopes);
  if (!objects.mask.is_none()) {
    const Tensor& bits =
        arrays.import({"mask", {"num_tokens", "mask_bytes"}, {"uint8"}}, objects.mask);
    p.mask = bits.data<uint8_t>();
    p.mask_stride = bits.stride(0);
    p.mask_bytes = bits.dim(1);
    p.mask_starts =
        arrays.vector<int32_t>("mask_starts", "num_seqs", {"int32"}, objects.mask_starts);
  }
  if (!objects.page_generations.is_none()) {
    arrays.sizes.bind("num_pages", p.kv.num_pages, "pool");
    p.generations = arrays.vector<uint32_t>("page_generations", "num_pages", kGenerationTypes,
                                            objects.page_generations);
    const Tensor& expected = arrays.import(
        batch.table_spec("expected_generations", kGenerationTypes), objects.expected_generations);
    p.expected_generations = expected.data<uint32_t>();
    p.expected_stride = expected.stride(0);
  }
  const std::string q_type = q.type_name();
  const Tensor& out = arrays.import({"out",
                                     {"num_tokens", "num_q_heads", "head_dim_v"},
                                     {q_type.c_str()},
                                     Strides::kLastContiguous,
                                     true},
                                    objects.out);
  KVLINK_CHECK(!overlap(q, out), "out: expected memory of its own; got some that q is in, too");
  p.out = out.data<void>();
  p.out_stride_token = out.stride(0);
  p.out_stride_head = out.stride(1);
  if (objects.lse.is_none()) return;
  p.lse =
      arrays
          .import({"lse", {"num_tokens", "num_q_heads"}, {"float32"}, Strides::kContiguous, true},
                  objects.lse)
          .data<float>();
}

void set_scores(PagedAttentionParams& params, bool causal, float scale, int64_t window,
                float softcap) {
  KVLINK_CHECK(std::isfinite(scale), "scale: expected a finite number; got ", scale);
  KVLINK_CHECK(window >= 0, "window: expected >= 0 (0: everything); got ", window);
  KVLINK_CHECK(std::isfinite(softcap) && softcap >= 0.0f,
               "softcap: expected a finite number >= 0 (0: none); got ", softcap);
  params.causal = causal;
  params.scale = scale;
  params.window = window;
  params.softcap = softcap;
}

MergeArgs::MergeArgs(const dlpack::Device& device, const std::vector<py::object>& out_objects,
                     const std::vector<py::object>& lse_objects, const py::object& out,
                     const py::object& lse)
    : arrays(device) {
  KVLINK_CHECK(!out_objects.empty() && out_objects.size() == lse_objects.size(),
               "states: expected one lse for each of at least one out; got ", out_objects.size(),
               " outs and ", lse_objects.size(), " lses");
  const auto import = [&](const std::string& name, std::vector<TensorSpec::Axis> axes,
                          std::vector<const char*> dtypes, const py::object& array,
                          bool writable = false) -> const Tensor& {
    return arrays.import(
        {name.c_str(), std::move(axes), std::move(dtypes), Strides::kContiguous, writable}, array);
  };
  const std::vector<TensorSpec::Axis> rows = {"num_tokens", "num_heads"};
  const std::vector<TensorSpec::Axis> values = {"num_tokens", "num_heads", "head_dim"};
  std::string type;
  for (size_t i = 0; i < out_objects.size(); ++i) {
    const auto types = type.empty() ? kFloatTypes : std::vector<const char*>{type.c_str()};
    const Tensor& part = import(concat("outs[", i, "]"), values, types, out_objects[i]);
    outs.push_back(part.data<void>());
    lses.push_back(
        import(concat("lses[", i, "]"), rows, {"float32"}, lse_objects[i]).data<float>());
    type = part.type_name();
  }
  const Tensor& merged = import("out", values, {type.c_str()}, out, true);
  params = {.outs = outs.data(),
            .lses = lses.data(),
            .num_states = static_cast<int64_t>(outs.size()),
            .out = merged.data<void>(),
            .lse = import("lse", rows, {"float32"}, lse, true).data<float>(),
            .dtype = *merged.dtype(),
            .num_tokens = merged.dim(0),
            .num_heads = static_cast<int32_t>(merged.dim(1)),
            .head_dim = static_cast<int32_t>(merged.dim(2))};
}

}  // namespace kvlink::bindings
