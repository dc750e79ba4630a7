#pragma once

#include "kvlink/params/append_kv.hpp"

namespace kvlink::cpu {

// Writes each token into its slot, converted like relayout_pages converts. When a slot is named
// more than once, which token ends up in it (or a mix of them) is undefined. Nothing is written
// unless all slots are -1 or inside the layer: InvalidArgument names the first that is not.
void append_kv(const AppendKVParams& params);

}  // namespace kvlink::cpu
