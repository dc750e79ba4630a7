// Device memory for what a call's kernels tell each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

namespace kvlink::cuda {

// Of calls on one stream, one after the other: kept from call to call, so that most calls allocate
// nothing. It is kept for 32 streams of a device; beyond those, a stream takes over the memory of
// the one used longest ago, which may not exist any more, once its calls have ended. Where a graph
// is captured the memory is the graph's own, so that graphs may be replayed side by side; it is the
// call's own, too, where it is too large to be kept, and where none can be taken over.
//
// A Workspace lives while kernels are queued that use it; no other call on the stream gets it
// meanwhile.
class Workspace {
 public:
  // `num_counters` of 0, which the kernels must leave at 0, and `num_bytes` of anything. Throws as
  // check_cuda does.
  Workspace(int64_t num_counters, int64_t num_bytes, cudaStream_t stream);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  uint32_t* counters() const { return reinterpret_cast<uint32_t*>(memory_); }
  char* data() const { return data_; }  // aligned to 256 bytes
  // The kernels are queued; a workspace that is not told so is not used again.
  void queued() { queued_ = true; }

 private:
  struct Kept;
  static Kept* find(unsigned long long stream, std::unique_lock<std::mutex>& locked);
  void take(int64_t counter_bytes, int64_t num_bytes);

  cudaStream_t stream_;
  Kept* kept_ = nullptr;
  std::unique_lock<std::mutex> lock_;
  char *memory_ = nullptr, *data_ = nullptr;
  bool queued_ = false;
};

}  // namespace kvlink::cuda
