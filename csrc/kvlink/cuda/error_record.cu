#include <atomic>
#include <mutex>

#include "kvlink/base/check.hpp"
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

ErrorRecord* error_record() {
  static std::mutex mutex;
  static ErrorRecord* record = nullptr;  // lives as long as the process
  const std::lock_guard lock(mutex);
  if (!record) {
    void* memory = nullptr;
    check_cuda(
        cudaHostAlloc(&memory, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable),
        "cudaHostAlloc of the error record");
    record = static_cast<ErrorRecord*>(memory);
    *record = kNoError;
  }
  return record;
}

void report_errors() {
  const ErrorRecord seen = std::atomic_ref(*error_record()).exchange(kNoError);
  if (seen == kNoError) return;
  constexpr const char* kNames[] = {"slots", "src_pages", "dst_pages", "pages"};
  const auto argument = static_cast<int>(seen >> 61);
  const auto index = static_cast<int64_t>(seen >> 32 & ((1 << 29) - 1));
  const auto value = static_cast<int32_t>(seen & 0xffffffffu);
  const std::string text = concat("an earlier call on CUDA: ", kNames[argument], "[", index,
                                  "] lies outside the pool and was skipped; got ", value);
  if (argument == static_cast<int>(BadEntry::kSlots)) throw InvalidArgument(text);
  throw PageTableError(text);
}

}  // namespace kvlink::cuda
