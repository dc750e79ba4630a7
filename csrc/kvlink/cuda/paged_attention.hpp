#pragma once

#include <cuda_runtime.h>

#include "kvlink/cuda/wait_ready.hpp"
#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cuda {

// cpu::paged_attention on the device: every pointer of params is a device pointer, the work is
// queued on `stream` and nothing is waited for, so a CUDA graph can capture it and replay it with
// other contents of seq_lens and page_table. `q_indptr` null: the kernel for decode; else, and for
// latent pools, the one for extend. The bits of a row depend on its sequence alone and on that
// choice. `ready` is waited for on the device before anything of the pool is read (params.ready is
// for the host).
//
// What must not be used as an index is looked at on the device and reported by a later call
// (error_record.hpp): a bad page counts as one of zeros; a sequence whose length or indptr is wrong
// sees nothing, as does everything when `ready` has not come in time. Throws InvalidArgument,
// Unsupported; what an earlier call left behind.
void paged_attention(const PagedAttentionParams& params, const ReadyCounters& ready,
                     cudaStream_t stream);

}  // namespace kvlink::cuda
