#pragma once

#include "kvlink/base/simd_level.hpp"
#include "kvlink/params/rope.hpp"

namespace kvlink::cpu {

// The rotated dims lie in the rows, and every position of a token in the table: of all tokens, or
// of those whose slot is not negative where `slots` [num_tokens] is given. Throws InvalidArgument.
void check_rope(const RopeParams& rope, int64_t num_tokens, int64_t head_dim, const int64_t* slots);

// out = x with its dims turned. Throws InvalidArgument; nothing has been written then.
void apply_rope(const ApplyRopeParams& params);

KVLINK_SIMD_DECLARE(
    // Turns token `token` of x (all heads) and writes it to rows of floats, head_dim apart.
    void rotate_token(const ApplyRopeParams& params, int64_t token, float* rows);
    // rotate_token, into `out`. `row` holds head_dim floats.
    void rotate_token_in_place(const ApplyRopeParams& params, int64_t token, float* row);)

}  // namespace kvlink::cpu
