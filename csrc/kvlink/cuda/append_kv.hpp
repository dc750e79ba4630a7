#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "kvlink/params/append_kv.hpp"

namespace kvlink::cuda {

// cpu::append_kv on the device, one launch for up to 40 layers: every pointer of the params is a
// device pointer, the work is queued on `stream` and nothing is waited for. Tokens of bad slots,
// and of positions outside of the rope's table, are skipped and reported by a later call
// (error_record.hpp). Throws InvalidArgument, Unsupported; what an earlier call left behind.
void append_kv(const std::vector<AppendKVParams>& layers, cudaStream_t stream);

}  // namespace kvlink::cuda
