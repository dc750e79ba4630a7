#pragma once

#include <cuda_runtime.h>

#include "kvlink/cuda/wait_ready.hpp"
#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::cuda {

// What the operators have on a device alone.
struct DeviceOptions {
  ReadyCounters ready;  // waited for on the device, before anything is read
  // Device memory that the digest is added to; nobody waits for it.
  uint64_t* digest_into = nullptr;
  RaisedCounters raised;  // when all rows are there; not if some could not be moved
};

// cpu::relayout_pages and cpu::digest_pages on the device: pools and page ids are device pointers
// (the arrays of layers are host pointers) and the work is queued on `stream`, one launch for up to
// 40 layers. Only a digest that has nowhere to go is waited for; a CUDA graph can capture all other
// calls. Bad page ids are skipped and reported by a later call (error_record.hpp), and nothing is
// read when `ready` has not come in time; that destination pages are distinct is the caller's duty
// here. Throws InvalidArgument, Unsupported; what an earlier call left behind.
RelayoutResult relayout_pages(const RelayoutParams& params, const DeviceOptions& options,
                              cudaStream_t stream);
RelayoutResult digest_pages(const DigestParams& params, const DeviceOptions& options,
                            cudaStream_t stream);

}  // namespace kvlink::cuda
