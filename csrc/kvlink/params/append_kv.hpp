#pragma once

#include <cstdint>

#include "kvlink/layout/kv_layout.hpp"
#include "kvlink/params/rope.hpp"

namespace kvlink {

// Writes token t of k and v into slot slots[t] of the layer, converted to the layer's dtype.
struct AppendKVParams {
  const void* k = nullptr;         // [num_tokens, num_kv_heads, head_dim], dim contiguous
  const void* v = nullptr;         // [num_tokens, num_kv_heads, head_dim_v]; null when latent
  const int64_t* slots = nullptr;  // [num_tokens] page * page_size + slot; -1: token is skipped
  int64_t num_tokens = 0;
  DType dtype = DType::kFloat32;                  // of k and v: float32, float16 or bfloat16
  int64_t k_stride_token = 0, k_stride_head = 0;  // elements
  int64_t v_stride_token = 0, v_stride_head = 0;
  LayerView kv;
  const RopeParams* rope = nullptr;  // turns K on its way; null: K is stored as it is
};

}  // namespace kvlink
