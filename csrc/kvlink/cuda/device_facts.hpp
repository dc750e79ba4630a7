// What is asked of a device, or told to it, once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kvlink::cuda {

// Of the current device.
unsigned num_processors();

// Lets a kernel have so much dynamic shared memory on the current device. Throws as check_cuda
// does, naming `what`.
void allow_shared_bytes(const char* what, const void* kernel, size_t num_bytes);

}  // namespace kvlink::cuda
