#pragma once

#include "kvlink/base/simd_level.hpp"
#include "kvlink/params/merge_states.hpp"

namespace kvlink::cpu {

// Joins partial attention results; see MergeStatesParams. A state whose lse is -inf has seen
// nothing and is not read; where all are, the result is 0 and -inf. Throws InvalidArgument,
// Unsupported.
void merge_states(const MergeStatesParams& params);

KVLINK_SIMD_DECLARE(
    // Rows [first_row, last_row) of num_tokens * num_heads.
    void merge_rows(const MergeStatesParams& params, int64_t first_row, int64_t last_row);)

}  // namespace kvlink::cpu
