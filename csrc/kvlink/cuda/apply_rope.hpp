#pragma once

#include <cuda_runtime.h>

#include "kvlink/params/rope.hpp"

namespace kvlink::cuda {

// cpu::apply_rope on the device: every pointer is a device pointer, the work is queued on `stream`
// and nothing is waited for. Tokens whose position is outside of the table are not written, and
// reported by a later call (error_record.hpp). Throws InvalidArgument; what an earlier call left.
void apply_rope(const ApplyRopeParams& params, cudaStream_t stream);

}  // namespace kvlink::cuda
