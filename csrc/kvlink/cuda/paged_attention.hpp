#pragma once

#include <cuda_runtime.h>

#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cuda {

// cpu::paged_attention on the device: every pointer of params is a device pointer, the work is
// queued on `stream` and nothing is waited for, so a CUDA graph can capture it and replay it with
// other contents of seq_lens and page_table. `q_indptr` null: the kernel for decode, which splits
// sequences; else the one for extend. The bits of a sequence depend on it alone and on that choice.
//
// What must not be used as an index is looked at on the device and reported by a later call
// (error_record.hpp): a bad page counts as one of zeros; a sequence whose length or indptr is wrong
// sees nothing. Throws InvalidArgument, Unsupported; what an earlier call left behind.
void paged_attention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace kvlink::cuda
