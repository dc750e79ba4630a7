#pragma once

#include <cuda_runtime.h>

#include "kvlink/params/append_kv.hpp"

namespace kvlink::cuda {

// cpu::append_kv on the device: every pointer of params is a device pointer, the work is queued on
// `stream` and nothing is waited for. Bad slots are skipped and reported by a later call
// (error_record.hpp). Throws InvalidArgument, Unsupported; PageTableError of an earlier call.
void append_kv(const AppendKVParams& params, cudaStream_t stream);

}  // namespace kvlink::cuda
