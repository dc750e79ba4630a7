#pragma once

#include <vector>

#include "kvlink/params/append_kv.hpp"

namespace kvlink::cpu {

// Writes each token into its slot, converted like relayout_pages converts. When a slot is named
// more than once, which token ends up in it (or a mix of them) is undefined. Nothing is written
// unless all slots are -1 or inside the layer: InvalidArgument names the first that is not.
//
// One element of `layers` per layer written; num_tokens, slots and rope are those of the first.
void append_kv(const std::vector<AppendKVParams>& layers);

}  // namespace kvlink::cpu
