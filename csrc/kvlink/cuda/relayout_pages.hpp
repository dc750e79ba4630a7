#pragma once

#include <cuda_runtime.h>

#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::cuda {

// cpu::relayout_pages and cpu::digest_pages on the device: pools and page ids are device pointers
// (the arrays of layers are host pointers) and the work is queued on `stream`. Only a digest is
// waited for. Bad page ids are skipped and reported by a later call (error_record.hpp); that
// destination pages are distinct is the caller's duty here. Throws InvalidArgument, Unsupported;
// PageTableError of an earlier call.
RelayoutResult relayout_pages(const RelayoutParams& params, cudaStream_t stream);
RelayoutResult digest_pages(const DigestParams& params, cudaStream_t stream);

}  // namespace kvlink::cuda
