#pragma once

#include <cstdint>

#include "kvlink/base/dtype.hpp"

namespace kvlink {

// Joins two attention results over disjoint sets of positions.
struct MergeStatesParams {
  const void* out_a = nullptr;   // [num_tokens, num_heads, head_dim] contiguous
  const float* lse_a = nullptr;  // [num_tokens, num_heads] contiguous, natural log
  const void* out_b = nullptr;
  const float* lse_b = nullptr;
  void* out = nullptr;   // may alias out_a or out_b
  float* lse = nullptr;  // may alias lse_a or lse_b
  DType dtype = DType::kFloat32;  // of out_a, out_b and out: float32, float16 or bfloat16
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
};

}  // namespace kvlink
