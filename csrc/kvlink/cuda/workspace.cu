#include <algorithm>
#include <deque>

#include "kvlink/base/math.hpp"
#include "kvlink/cuda/error_record.hpp"
#include "kvlink/cuda/workspace.hpp"

namespace kvlink::cuda {

namespace {

constexpr size_t kMostKept = 64;                      // streams
constexpr int64_t kLargestKept = int64_t{288} << 20;  // bytes
constexpr int64_t kStep = int64_t{1} << 20;

// What is too small grows by half at least, so that it does not grow often.
int64_t grown(int64_t had, int64_t needed) {
  return needed <= had ? had : std::max(needed, std::min(had + had / 2, kLargestKept));
}

}  // namespace

struct Workspace::Kept {
  Kept(int on_device, unsigned long long on_stream) : device(on_device), stream(on_stream) {}

  const int device;
  const unsigned long long stream;  // its number, which no other stream will have
  std::mutex mutex;
  char* memory = nullptr;
  int64_t counter_bytes = 0, num_bytes = 0;
};

// Null: there are too many.
Workspace::Kept* Workspace::find(unsigned long long stream) {
  static std::mutex mutex;
  static auto& all = *new std::deque<Kept>;  // as long as the process: drivers end before objects
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  for (Kept& each : all) {
    if (each.stream == stream && each.device == device) return &each;
  }
  return all.size() < kMostKept ? &all.emplace_back(device, stream) : nullptr;
}

// Memory of this call alone.
void Workspace::take(int64_t counter_bytes, int64_t num_bytes) {
  void* memory = nullptr;
  check_cuda(cudaMallocAsync(&memory, static_cast<size_t>(counter_bytes + num_bytes), stream_),
             "cudaMallocAsync");
  memory_ = static_cast<char*>(memory);
  data_ = memory_ + counter_bytes;
  if (counter_bytes == 0) return;
  const cudaError_t cleared =
      cudaMemsetAsync(memory, 0, static_cast<size_t>(counter_bytes), stream_);
  if (cleared == cudaSuccess) return;
  cudaFreeAsync(memory, stream_);
  check_cuda(cleared, "cudaMemsetAsync");
}

Workspace::Workspace(int64_t num_counters, int64_t num_bytes, cudaStream_t stream)
    : stream_(stream) {
  int64_t counter_bytes = round_up(num_counters * int64_t{sizeof(uint32_t)}, int64_t{256});
  // NOTE: cudaStreamPerThread is another stream in each thread, maybe of one number.
  if (stream != cudaStreamPerThread && !is_captured(stream) &&
      counter_bytes + num_bytes <= kLargestKept) {
    unsigned long long number = 0;
    check_cuda(cudaStreamGetId(stream, &number), "cudaStreamGetId");
    kept_ = find(number);
  }
  if (!kept_) {
    take(counter_bytes, num_bytes);
    return;
  }
  lock_ = std::unique_lock(kept_->mutex);
  if (!kept_->memory || kept_->counter_bytes < counter_bytes || kept_->num_bytes < num_bytes) {
    // NOTE: what was queued before on the stream may still use the old memory, and ends first.
    if (kept_->memory) cudaFreeAsync(kept_->memory, stream);
    kept_->memory = nullptr;
    counter_bytes = grown(kept_->counter_bytes, counter_bytes);
    num_bytes = round_up(grown(kept_->num_bytes, num_bytes), kStep);
    take(counter_bytes, num_bytes);
    kept_->memory = memory_;
    kept_->counter_bytes = counter_bytes;
    kept_->num_bytes = num_bytes;
  }
  memory_ = kept_->memory;
  data_ = memory_ + kept_->counter_bytes;
}

Workspace::~Workspace() {
  if (kept_ && queued_) return;
  cudaFreeAsync(memory_, stream_);
  if (kept_) kept_->memory = nullptr;
}

}  // namespace kvlink::cuda
