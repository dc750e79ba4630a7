#include <algorithm>
#include <deque>

#include "kvlink/base/math.hpp"
#include "kvlink/cuda/error_record.hpp"
#include "kvlink/cuda/workspace.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kMostKept = 32;                         // streams of a device
constexpr int kMostUnmarked = 4;                      // of these, whose calls leave no event
constexpr int64_t kLargestKept = int64_t{288} << 20;  // bytes
constexpr int64_t kStep = int64_t{1} << 20;

// What is too small grows by half at least, so that it does not grow often.
int64_t grown(int64_t had, int64_t needed) {
  return needed <= had ? had : std::max(needed, std::min(had + had / 2, kLargestKept));
}

// Asked while another thread may capture a graph, which this is no part of.
bool is_over(cudaEvent_t event) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  const cudaError_t status = cudaEventQuery(event);
  cudaGetLastError();  // that it is not over is no error of anybody's call
  cudaThreadExchangeStreamCaptureMode(&mode);
  return status == cudaSuccess;
}

}  // namespace

struct Workspace::Kept {
  Kept(int on_device, unsigned long long of_stream) : device(on_device), stream(of_stream) {}

  const int device;
  // Its number, which no other stream will have. Changes under the lock of all and under `mutex`.
  unsigned long long stream;
  uint64_t last_used = 0;  // under the lock of all
  std::mutex mutex;        // of what follows
  char* memory = nullptr;
  int64_t counter_bytes = 0, num_bytes = 0;
  cudaEvent_t behind = nullptr;  // the last call; null: the memory is never given away
  bool marked = true;            // the event was recorded
};

// Locked, or null: there are too many. No stream can be asked whether it still exists, so when all
// places are taken, the one used longest ago goes to who needs one, if nothing of its calls runs.
Workspace::Kept* Workspace::find(unsigned long long stream, std::unique_lock<std::mutex>& locked) {
  static std::mutex mutex;
  static auto& all = *new std::deque<Kept>;  // as long as the process: drivers end before objects
  static uint64_t now = 0;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  while (true) {
    Kept *found = nullptr, *oldest = nullptr;
    {
      const std::lock_guard lock(mutex);
      int count = 0;
      for (Kept& each : all) {
        if (each.device != device) continue;
        if (each.stream == stream) found = &each;
        if (each.behind && (!oldest || each.last_used < oldest->last_used)) oldest = &each;
        ++count;
      }
      if (!found && count < kMostKept) {
        found = &all.emplace_back(device, stream);
        if (count >= kMostUnmarked) {
          check_cuda(cudaEventCreateWithFlags(&found->behind, cudaEventDisableTiming),
                     "cudaEventCreate");
        }
      }
      if (!found) {
        std::unique_lock of_oldest(oldest->mutex, std::try_to_lock);
        if (!of_oldest || !oldest->marked || !is_over(oldest->behind)) return nullptr;
        locked = std::move(of_oldest);
        oldest->stream = stream;
        oldest->last_used = ++now;
        return oldest;
      }
      found->last_used = ++now;
    }
    locked = std::unique_lock(found->mutex);
    if (found->stream == stream) return found;  // else it was given away meanwhile
    locked.unlock();
  }
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
    kept_ = find(number, lock_);
  }
  if (!kept_) {
    take(counter_bytes, num_bytes);
    return;
  }
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
  if (!kept_ || !queued_) cudaFreeAsync(memory_, stream_);
  if (!kept_) return;
  if (!queued_) kept_->memory = nullptr;
  if (!kept_->behind) return;
  kept_->marked = cudaEventRecord(kept_->behind, stream_) == cudaSuccess;
}

}  // namespace kvlink::cuda
