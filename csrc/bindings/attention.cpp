#include <pybind11/stl.h>

#include "attention_args.hpp"
#include "kvlink/base/check.hpp"
#include "kvlink/cpu/merge_states.hpp"
#include "kvlink/cpu/paged_attention.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"
#include "pool.hpp"
#include "readiness.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace {

void check_pool(const PoolView& pool) {
  KVLINK_CHECK(pool.device.type == dlpack::kDeviceCpu,
               "pool: expected host memory; got device type ", pool.device.type);
}

void paged_attention(const py::object& q, const PoolView& pool, int64_t layer,
                     const py::object& page_table, const py::object& seq_lens,
                     const py::object& q_indptr, const py::object& page_indptr, bool causal,
                     float scale, int64_t window, float softcap, const py::object& sinks,
                     const py::object& alibi_slopes, const py::object& out, const py::object& lse,
                     const ReadyItems& ready, double ready_timeout, const py::object& q_positions,
                     const py::object& mask, const py::object& mask_starts,
                     const py::object& generations, const py::object& expected_generations,
                     const py::object& plan) {
  check_pool(pool);
  AttentionBatch batch(pool, layer, page_table, seq_lens, q_indptr, page_indptr);
  import_attention(batch, {q, sinks, alibi_slopes, out, lse, q_positions, mask, mask_starts,
                           generations, expected_generations});
  PagedAttentionParams& p = batch.params;
  set_scores(p, causal, scale, window, softcap);
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
  check_pool(pool);
  AttentionBatch batch(pool, 0, page_table, seq_lens, q_indptr, page_indptr);
  PagedAttentionParams& p = batch.params;
  p.num_tokens = p.q_indptr && p.num_seqs > 0 ? p.q_indptr[p.num_seqs] : p.num_seqs;
  p.num_q_heads = num_q_heads;
  p.causal = causal;
  p.window = window;
  cpu::check_batch(p);
  return {p, batch.arrays.vector<int32_t>("max_seq_lens", "num_seqs", {"int32"}, max_seq_lens)};
}

void merge_states(const std::vector<py::object>& outs, const std::vector<py::object>& lses,
                  const py::object& out, const py::object& lse) {
  const MergeArgs args({dlpack::kDeviceCpu, 0}, outs, lses, out, lse);
  py::gil_scoped_release nogil;
  cpu::merge_states(args.params);
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
             py::arg("num_q_heads").noconvert(), py::arg("causal"), py::arg("window").noconvert(),
             py::arg("max_seq_lens"), "See kvlink.plan_attention; window 0 means none.");
  module.def("paged_attention", &paged_attention, py::arg("q"), py::arg("pool"),
             py::arg("layer").noconvert(), py::arg("page_table"), py::arg("seq_lens"),
             py::arg("q_indptr"), py::arg("page_indptr"), py::arg("causal"), py::arg("scale"),
             py::arg("window").noconvert(), py::arg("softcap"), py::arg("sinks"),
             py::arg("alibi_slopes"), py::arg("out"), py::arg("lse"),
             py::arg("ready") = py::tuple(), py::arg("ready_timeout") = 0.0,
             py::arg("q_positions") = py::none(), py::arg("mask") = py::none(),
             py::arg("mask_starts") = py::none(), py::arg("page_generations") = py::none(),
             py::arg("expected_generations") = py::none(), py::arg("plan") = py::none(),
             "See kvlink.paged_attention; window 0 and softcap 0 mean none.");
  module.def("merge_states", &merge_states, py::arg("outs"), py::arg("lses"), py::arg("out"),
             py::arg("lse"), "See kvlink.merge_states.");
}

}  // namespace kvlink::bindings
