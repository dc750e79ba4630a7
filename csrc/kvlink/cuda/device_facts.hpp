// What is asked of a device, or told to it, once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kvlink::cuda {

// Of the current device.
unsigned num_processors();

// Lets a kernel have so much dynamic shared memory on the current device. Throws Unsupported where
// there is less, else as check_cuda does, naming `what`.
void allow_shared_bytes(const char* what, const void* kernel, size_t num_bytes);

// Loads a kernel on the current device without launching it. CUDA loads kernels when they are first
// launched, and may wait for all that runs before it does: so whatever is launched behind a kernel
// that waits for the host, or for another stream, is loaded before it. Throws as check_cuda does.
void load_kernel(const char* what, const void* kernel);

}  // namespace kvlink::cuda
