// What attention and merging are called with in Python, checked, as their Params: the same wherever
// the arrays are.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <vector>

#include "kvlink/params/merge_states.hpp"
#include "kvlink/params/paged_attention.hpp"
#include "pool.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

// Imports arrays that must all be on one device (those of the host: in its memory), and keeps them.
class DeviceArrays {
 public:
  explicit DeviceArrays(const dlpack::Device& device) : device_(device) {}

  // Throws InvalidArgument.
  const Tensor& import(TensorSpec spec, const pybind11::object& array);
  // Of one axis; null for None.
  template <typename T>
  const T* vector(const char* name, const char* size, std::vector<const char*> dtypes,
                  const pybind11::object& array) {
    if (array.is_none()) return nullptr;
    return import({name, {size}, std::move(dtypes), TensorSpec::Strides::kContiguous}, array)
        .template data<T>();
  }

  Symbols sizes;

 private:
  dlpack::Device device_;
  std::deque<Tensor> kept_;
};

// Which pages the sequences of a batch have, and which rows of q.
struct AttentionBatch {
  AttentionBatch(const PoolView& pool, int64_t layer, const pybind11::object& page_table,
                 const pybind11::object& seq_lens, const pybind11::object& q_indptr,
                 const pybind11::object& page_indptr);

  TensorSpec table_spec(const char* name, std::vector<const char*> dtypes) const;

  DeviceArrays arrays;
  PagedAttentionParams params;
};

struct AttentionObjects {
  const pybind11::object &q, &sinks, &alibi_slopes, &out, &lse;
  const pybind11::object &q_positions, &mask, &mask_starts;
  const pybind11::object &page_generations, &expected_generations;
};
// The rest of the batch's params, but for numbers and readiness. Throws InvalidArgument.
void import_attention(AttentionBatch& batch, const AttentionObjects& objects);
// How scores are made and hidden; window 0 and softcap 0 mean none. Throws InvalidArgument.
void set_scores(PagedAttentionParams& params, bool causal, float scale, int64_t window,
                float softcap);

struct MergeArgs {
  MergeArgs(const dlpack::Device& device, const std::vector<pybind11::object>& outs,
            const std::vector<pybind11::object>& lses, const pybind11::object& out,
            const pybind11::object& lse);

  DeviceArrays arrays;
  std::vector<const void*> outs;
  std::vector<const float*> lses;
  MergeStatesParams params;
};

}  // namespace kvlink::bindings
