#pragma once

#include <cuda_runtime.h>

#include "kvlink/params/merge_states.hpp"

namespace kvlink::cuda {

// cpu::merge_states on the device: outs and lses are host arrays of device pointers, the work is
// queued on `stream`. Throws InvalidArgument, Unsupported (dtypes).
void merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace kvlink::cuda
