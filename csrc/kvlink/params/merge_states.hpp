#pragma once

#include <cstdint>

#include "kvlink/base/dtype.hpp"

namespace kvlink {

// Joins attention results over disjoint sets of positions, in the order given.
struct MergeStatesParams {
  const void* const* outs =
      nullptr;  // [num_states] of [num_tokens, num_heads, head_dim] contiguous
  const float* const* lses =
      nullptr;  // [num_states] of [num_tokens, num_heads] contiguous, natural log
  int64_t num_states = 0;
  void* out = nullptr;            // may be one of outs
  float* lse = nullptr;           // may be one of lses
  DType dtype = DType::kFloat32;  // of outs and out: float32, float16 or bfloat16
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
};

}  // namespace kvlink
