#pragma once

#include <cuda_runtime.h>

#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

// Device memory that is given back in the order of the stream.
class Scratch {
 public:
  Scratch(size_t num_bytes, cudaStream_t stream) : stream_(stream) {
    check_cuda(cudaMallocAsync(&data_, num_bytes, stream), "cudaMallocAsync");
  }
  ~Scratch() { cudaFreeAsync(data_, stream_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace kvlink::cuda
