// The one place that launches kernels; csrc/emulation has its own.
#pragma once

#include <cuda_runtime.h>

#include "kvlink/cuda/device_facts.hpp"
#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

// Queues the kernel on `stream`. Throws as check_cuda does, naming `what`.
template <typename Args>
void launch(const char* what, void (*kernel)(Args), dim3 grid, unsigned num_threads,
            size_t shared_bytes, cudaStream_t stream, const Args& args) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (shared_bytes > kAlwaysAllowed) {
    allow_shared_bytes(what, reinterpret_cast<const void*>(kernel), shared_bytes);
  }
  kernel<<<grid, num_threads, shared_bytes, stream>>>(args);
  check_cuda(cudaGetLastError(), what);
}

// Loads it, so that a launch behind a kernel that waits need not (device_facts.hpp).
template <typename Args>
void load(const char* what, void (*kernel)(Args)) {
  load_kernel(what, reinterpret_cast<const void*>(kernel));
}

}  // namespace kvlink::cuda
