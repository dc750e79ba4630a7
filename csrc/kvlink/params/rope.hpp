#pragma once

#include <cstdint>

#include "kvlink/base/check.hpp"
#include "kvlink/base/dtype.hpp"

namespace kvlink {

// Rotary embedding: pairs of the dims [first_dim, first_dim + rotary_dim) turn by an angle that the
// table knows for every position. Pair i is dims i and i + rotary_dim / 2 of them, or, interleaved,
// dims 2 i and 2 i + 1: (a, b) becomes (a cos - b sin, b cos + a sin), in float32.
struct RopeParams {
  const float* cos_sin = nullptr;  // [num_positions, rotary_dim]: the pairs' cosines, then sines
  const int64_t* positions = nullptr;  // [num_tokens], rows of the table
  int64_t num_positions = 0;
  int64_t stride_position = 0;  // elements
  int32_t first_dim = 0;
  int32_t rotary_dim = 0;  // even
  bool interleaved = false;
};

// The rotated dims lie in rows of `head_dim`; throws InvalidArgument.
inline void check_rope_dims(const RopeParams& rope, int64_t head_dim) {
  KVLINK_CHECK(rope.rotary_dim > 0 && rope.rotary_dim % 2 == 0,
               "rope.cos_sin: expected an even number of columns; got ", rope.rotary_dim);
  KVLINK_CHECK(rope.first_dim >= 0 && rope.first_dim + int64_t{rope.rotary_dim} <= head_dim,
               "rope: expected rotated dims within the ", head_dim, " of a head; got ",
               rope.first_dim, " to ", rope.first_dim + int64_t{rope.rotary_dim} - 1);
}

struct ApplyRopeParams {
  const void* x = nullptr;        // [num_tokens, num_heads, head_dim], dim contiguous
  void* out = nullptr;            // the same shape and dtype; may be x
  DType dtype = DType::kFloat32;  // float32, float16 or bfloat16
  int64_t x_stride_token = 0, x_stride_head = 0;  // elements
  int64_t out_stride_token = 0, out_stride_head = 0;
  int64_t num_tokens = 0;
  int32_t num_heads = 0, head_dim = 0;
  RopeParams rope;
};

}  // namespace kvlink
