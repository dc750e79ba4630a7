#include <atomic>
#include <mutex>

#include "kvlink/base/check.hpp"
#include "kvlink/base/readiness.hpp"
#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // do not let it surface in somebody else's call
  const std::string text = concat(what, ": ", cudaGetErrorString(status));
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    throw Unsupported(concat("CUDA: no usable device: ", text));
  }
  throw std::runtime_error(text);
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

ErrorRecord* error_record() {
  static std::mutex mutex;
  static ErrorRecord* record = nullptr;  // lives as long as the process
  const std::lock_guard lock(mutex);
  if (!record) {
    void* memory = nullptr;
    // The first call may be one that a graph captures, and this is none of the graph's.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    const cudaError_t allocated =
        cudaHostAlloc(&memory, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check_cuda(allocated, "cudaHostAlloc of the error record");
    record = static_cast<ErrorRecord*>(memory);
    *record = kNoError;
  }
  return record;
}

void report_errors() {
  const ErrorRecord seen = std::atomic_ref(*error_record()).exchange(kNoError);
  if (seen == kNoError) return;
  constexpr const char* kOutside = "lies outside the pool and was skipped";
  constexpr struct {
    const char *name, *complaint;
  } kArguments[] = {
      {"slots", kOutside},
      {"src_pages", kOutside},
      {"dst_pages", kOutside},
      {"pages", kOutside},
      {"page_table", "is needed, but names no page of the pool"},  // index: in row-major order
      {"seq_lens", "is not between the sequence's query rows and what its page table holds"},
      {"q_indptr or page_indptr", "does not rise within what it divides"},
      {"page_generations", "is not what expected_generations has for a page that is needed"},
      {"q_positions", "is not a position of its sequence, from that of the row above on"},
      {"mask_starts", "is no position of its sequence, or the mask has too few bits from it on"},
      {"ready", "had not reached its target when the time to wait was over"},
      {"rope.positions", "is no row of cos_sin, so the token was skipped"},
  };
  const auto argument = static_cast<int>(seen >> 60);
  const auto index = static_cast<int64_t>(seen >> 32 & kMaxErrorIndex);
  const auto value = static_cast<int32_t>(seen & 0xffffffffu);
  const std::string text = concat("an earlier call on CUDA: ", kArguments[argument].name, "[",
                                  index, "] ", kArguments[argument].complaint, "; got ", value);
  switch (static_cast<BadEntry>(argument)) {
    case BadEntry::kSlots:
    case BadEntry::kSeqLens:
    case BadEntry::kIndptr:
    case BadEntry::kQPositions:
    case BadEntry::kMaskStarts:
    case BadEntry::kRopePositions:
      throw InvalidArgument(text);
    case BadEntry::kReady:
      throw NotReady(text);
    default:
      throw PageTableError(text);
  }
}

}  // namespace kvlink::cuda
