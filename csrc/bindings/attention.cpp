#include <pybind11/stl.h>

#include <deque>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/merge_states.hpp"
#include "kvlink/cpu/paged_attention.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"
#include "pool.hpp"
#include "readiness.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace {

using Strides = TensorSpec::Strides;

constexpr const char* kGenerationTypes[] = {"uint32", "int32"};

// Which pages the sequences of a batch have, and which rows of q.
struct Batch {
  Batch(const PoolView& pool, int64_t layer, const py::object& page_table,
        const py::object& seq_lens, const py::object& q_indptr, const py::object& page_indptr) {
    KVLINK_CHECK(pool.device.type == dlpack::kDeviceCpu,
                 "pool: expected host memory; got device type ", pool.device.type);
    params.kv = pool.layer(layer);
    sizes.bind("head_dim", params.kv.layout.head_dim, "pool");
    sizes.bind("head_dim_v", params.kv.layout.head_dim_v, "pool");
    const Tensor lens =
        keep(TensorSpec{"seq_lens", {"num_seqs"}, {"int32"}, Strides::kContiguous}.import(seq_lens,
                                                                                          sizes));
    sizes.bind("num_seqs + 1", sizes["num_seqs"] + 1, "seq_lens");
    params.seq_lens = lens.data<int32_t>();
    params.num_seqs = lens.dim(0);
    params.q_indptr = optional<int32_t>("q_indptr", "num_seqs + 1", "int32", q_indptr);
    params.page_indptr = optional<int32_t>("page_indptr", "num_seqs + 1", "int32", page_indptr);
    const Tensor pages = keep(table_spec("page_table", {"int32"}).import(page_table, sizes));
    params.page_table = pages.data<int32_t>();
    params.num_entries = pages.dim(params.page_indptr ? 0 : 1);
    params.page_table_stride = pages.stride(0);
  }

  // An argument of one axis; null for None.
  template <typename T>
  const T* optional(const char* name, const char* size, const char* dtype,
                    const py::object& array) {
    const auto tensor =
        TensorSpec{name, {size}, {dtype}, Strides::kContiguous}.import_optional(array, sizes);
    return tensor ? keep(*tensor).data<T>() : nullptr;
  }

  TensorSpec table_spec(const char* name, std::vector<const char*> dtypes) const {
    if (params.page_indptr) return {name, {"num_entries"}, std::move(dtypes), Strides::kContiguous};
    return {name, {"num_seqs", "max_pages"}, std::move(dtypes)};
  }

  const Tensor& keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return kept.back();
  }

  Symbols sizes;
  std::deque<Tensor> kept;
  PagedAttentionParams params;
};

void paged_attention(const py::object& q, const PoolView& pool, int64_t layer,
                     const py::object& page_table, const py::object& seq_lens,
                     const py::object& q_indptr, const py::object& page_indptr, bool causal,
                     float scale, int64_t window, float softcap, const py::object& sinks,
                     const py::object& alibi_slopes, const py::object& out, const py::object& lse,
                     const ReadyItems& ready, double ready_timeout, const py::object& q_positions,
                     const py::object& mask, const py::object& mask_starts,
                     const py::object& generations, const py::object& expected_generations,
                     const py::object& plan) {
  Batch batch(pool, layer, page_table, seq_lens, q_indptr, page_indptr);
  PagedAttentionParams& p = batch.params;
  Symbols& sizes = batch.sizes;
  const Tensor& q_in = batch.keep(
      TensorSpec{"q", {"num_tokens", "num_q_heads", "head_dim"}, kFloatTypes}.import(q, sizes));
  p.q = q_in.data<void>();
  p.q_dtype = *q_in.dtype();
  p.q_stride_token = q_in.stride(0);
  p.q_stride_head = q_in.stride(1);
  p.num_tokens = q_in.dim(0);
  p.num_q_heads = static_cast<int32_t>(q_in.dim(1));
  p.q_positions = batch.optional<int32_t>("q_positions", "num_tokens", "int32", q_positions);
  p.sinks = batch.optional<float>("sinks", "num_q_heads", "float32", sinks);
  p.alibi_slopes = batch.optional<float>("alibi_slopes", "num_q_heads", "float32", alibi_slopes);
  if (!mask.is_none()) {
    const Tensor& bits =
        batch.keep(TensorSpec{"mask", {"num_tokens", "mask_bytes"}, {"uint8"}}.import(mask, sizes));
    p.mask = bits.data<uint8_t>();
    p.mask_stride = bits.stride(0);
    p.mask_bytes = bits.dim(1);
    p.mask_starts = batch.optional<int32_t>("mask_starts", "num_seqs", "int32", mask_starts);
  }
  if (!generations.is_none()) {
    sizes.bind("num_pages", p.kv.num_pages, "pool");
    const std::vector<const char*> types(std::begin(kGenerationTypes), std::end(kGenerationTypes));
    const TensorSpec spec{"page_generations", {"num_pages"}, types, Strides::kContiguous};
    p.generations = batch.keep(spec.import(generations, sizes)).data<uint32_t>();
    const Tensor& expected = batch.keep(
        batch.table_spec("expected_generations", types).import(expected_generations, sizes));
    p.expected_generations = expected.data<uint32_t>();
    p.expected_stride = expected.stride(0);
  }

  const std::string q_type = q_in.type_name();
  TensorSpec out_spec{"out", {"num_tokens", "num_q_heads", "head_dim_v"}, {q_type.c_str()}};
  out_spec.writable = true;
  const Tensor& out_array = batch.keep(out_spec.import(out, sizes));
  p.out = out_array.data<void>();
  p.out_stride_token = out_array.stride(0);
  p.out_stride_head = out_array.stride(1);
  TensorSpec lse_spec{"lse", {"num_tokens", "num_q_heads"}, {"float32"}, Strides::kContiguous};
  lse_spec.writable = true;
  const auto lse_array = lse_spec.import_optional(lse, sizes);
  p.lse = lse_array ? lse_array->data<float>() : nullptr;

  p.causal = causal;
  p.scale = scale;
  p.window = window;
  p.softcap = softcap;
  const auto awaited = to_readiness(ready);
  p.ready = make_wait(awaited, ready_timeout);
  const auto* given = plan.is_none() ? nullptr : plan.cast<const cpu::AttentionPlan*>();
  py::gil_scoped_release nogil;
  cpu::paged_attention(p, given);
}

cpu::AttentionPlan make_plan(const PoolView& pool, const py::object& page_table,
                             const py::object& seq_lens, const py::object& q_indptr,
                             const py::object& page_indptr, int32_t num_q_heads, bool causal,
                             int64_t window, const py::object& max_seq_lens) {
  Batch batch(pool, 0, page_table, seq_lens, q_indptr, page_indptr);
  PagedAttentionParams& p = batch.params;
  p.num_tokens = p.q_indptr && p.num_seqs > 0 ? p.q_indptr[p.num_seqs] : p.num_seqs;
  p.num_q_heads = num_q_heads;
  p.causal = causal;
  p.window = window;
  cpu::check_batch(p);
  return {p, batch.optional<int32_t>("max_seq_lens", "num_seqs", "int32", max_seq_lens)};
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
  py::class_<cpu::AttentionPlan>(module, "AttentionPlan", "How the work of calls is divided.")
      .def_property_readonly(
          "num_tasks", [](const cpu::AttentionPlan& self) { return self.tasks.size(); },
          "Pieces of work that threads take.")
      .def_property_readonly(
          "shared_prefixes",
          [](const cpu::AttentionPlan& self) {
            std::vector<std::pair<std::vector<int32_t>, int64_t>> found;
            for (const auto& group : self.groups) {
              found.emplace_back(group.seqs, group.num_splits * cpu::kSplitTokens);
            }
            return found;
          },
          "(sequences, leading tokens) read once for all of them.");
  module.def("plan_attention", &make_plan, py::arg("pool"), py::arg("page_table"),
             py::arg("seq_lens"), py::arg("q_indptr"), py::arg("page_indptr"),
             py::arg("num_q_heads"), py::arg("causal"), py::arg("window"), py::arg("max_seq_lens"),
             "See kvlink.plan_attention; window 0 means none.");
  module.def("paged_attention", &paged_attention, py::arg("q"), py::arg("pool"), py::arg("layer"),
             py::arg("page_table"), py::arg("seq_lens"), py::arg("q_indptr"),
             py::arg("page_indptr"), py::arg("causal"), py::arg("scale"), py::arg("window"),
             py::arg("softcap"), py::arg("sinks"), py::arg("alibi_slopes"), py::arg("out"),
             py::arg("lse"), py::arg("ready") = py::tuple(), py::arg("ready_timeout") = 0.0,
             py::arg("q_positions") = py::none(), py::arg("mask") = py::none(),
             py::arg("mask_starts") = py::none(), py::arg("page_generations") = py::none(),
             py::arg("expected_generations") = py::none(), py::arg("plan") = py::none(),
             "See kvlink.paged_attention; window 0 and softcap 0 mean none.");
  module.def("merge_states", &merge_states, py::arg("outs"), py::arg("lses"), py::arg("out"),
             py::arg("lse"), "See kvlink.merge_states.");
}

}  // namespace kvlink::bindings
