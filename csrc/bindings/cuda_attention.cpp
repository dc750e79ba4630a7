#include <pybind11/stl.h>

#include "attention_args.hpp"
#include "cuda_module.hpp"
#include "kvlink/cuda/merge_states.hpp"
#include "kvlink/cuda/paged_attention.hpp"
#include "kvlink/cuda/paged_attention_sm90.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

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
  AttentionBatch batch(pool, layer, page_table, seq_lens, q_indptr, page_indptr);
  import_attention(batch, {q, sinks, alibi_slopes, out, lse, q_positions, mask, mask_starts,
                           generations, expected_generations});
  PagedAttentionParams& p = batch.params;
  set_scores(p, causal, scale, window, softcap);
  const cuda::ReadyCounters counters = ready_counters(ready, ready_timeout, pool.device);
  const py::gil_scoped_release nogil;
  cuda::paged_attention(p, counters, as_stream(stream));
}

void merge_states(const std::vector<py::object>& outs, const std::vector<py::object>& lses,
                  const py::object& out, const py::object& lse, uintptr_t stream) {
  dlpack::Device device;
  {
    const ConsumerStream device_alone(dlpack::kNoStreams);
    device = Tensor(out, "out").device();
  }
  KVLINK_CHECK(device.type == dlpack::kDeviceCuda,
               "out: expected an array on a CUDA device; got device type ", device.type);
  const DeviceGuard guard(device.id);
  const ConsumerStream consumer(static_cast<int64_t>(stream));
  const MergeArgs args(device, outs, lses, out, lse);
  const py::gil_scoped_release nogil;
  cuda::merge_states(args.params, as_stream(stream));
}

}  // namespace

void register_cuda_attention(py::module_& module) {
  module.def("paged_attention", &paged_attention, py::arg("q"), py::arg("pool"),
             py::arg("layer").noconvert(), py::arg("page_table"), py::arg("seq_lens"),
             py::arg("q_indptr"), py::arg("page_indptr"), py::arg("causal"), py::arg("scale"),
             py::arg("window").noconvert(), py::arg("softcap"), py::arg("sinks"),
             py::arg("alibi_slopes"), py::arg("out"), py::arg("lse"), py::arg("q_positions"),
             py::arg("mask"), py::arg("mask_starts"), py::arg("page_generations"),
             py::arg("expected_generations"), py::arg("ready"), py::arg("ready_timeout"),
             py::arg("stream"), "See kvlink.paged_attention; window 0 and softcap 0 mean none.");
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
