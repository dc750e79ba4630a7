#pragma once

#include "kvlink/cpu/paged_attention_plan.hpp"
#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cpu {

// Attention of ragged query rows over paged KV; see PagedAttentionParams for shapes. The bits of a
// row's result depend on its own sequence alone, not on the rest of the batch, the threads or the
// plan (null: one is made). Page table entries are checked where they are read. Throws
// InvalidArgument, PageTableError, Unsupported; nothing has been written then.
void paged_attention(const PagedAttentionParams& params, const AttentionPlan* plan = nullptr);

}  // namespace kvlink::cpu
