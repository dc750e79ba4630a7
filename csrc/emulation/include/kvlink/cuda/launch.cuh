// kvlink/cuda/launch.cuh for emulation: the grid has run when this returns.
#pragma once

#include <cuda_runtime.h>

#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

template <typename Args>
void launch(const char*, void (*kernel)(Args), dim3 grid, unsigned num_threads, size_t shared_bytes,
            cudaStream_t, const Args& args) {
  emulation::run_grid(grid, dim3(num_threads), shared_bytes, [&] { kernel(args); });
}

// There is nothing to load.
template <typename Args>
void load(const char*, void (*)(Args)) {}

}  // namespace kvlink::cuda
