#include "kvlink/cpu/merge_states.hpp"

#include <algorithm>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/base/threads.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kRowsPerTask = 64;

}  // namespace

void merge_states(const MergeStatesParams& params) {
  KVLINK_CHECK(params.num_states >= 1, "states: expected at least one; got ", params.num_states);
  const DType dtype = params.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    throw Unsupported(
        concat("out: supported dtypes are float32, float16, bfloat16; got ", dtype_name(dtype)));
  }
  const auto merge = KVLINK_SIMD_PICK(merge_rows);
  const int64_t num_rows = params.num_tokens * params.num_heads;
  parallel_for(ceil_div(num_rows, kRowsPerTask), [&](int64_t task) {
    merge(params, task * kRowsPerTask, std::min(num_rows, (task + 1) * kRowsPerTask));
  });
}

}  // namespace kvlink::cpu
