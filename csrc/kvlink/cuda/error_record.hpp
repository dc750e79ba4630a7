// Errors that only a kernel can see. A kernel that meets a bad page id or slot skips that row and
// leaves a record in host memory (error_record.cuh); no synchronisation is spent on it, and the
// next call reports it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvlink::cuda {

enum class BadEntry : int {
  kSlots = 0,
  kSrcPages = 1,
  kDstPages = 2,
  kPages = 3,
  kPageTable = 4,
  kSeqLens = 5,
  kIndptr = 6,
  kGenerations = 7,
  kQPositions = 8,
  kMaskStarts = 9,
  kReady = 10,
  kRopePositions = 11,
};

// argument << 60 | index << 32 | value, of the first bad entry that was seen; all ones: none.
// Indices and values saturate.
using ErrorRecord = unsigned long long;
inline constexpr int64_t kMaxErrorIndex = (1 << 28) - 1;
inline constexpr ErrorRecord kNoError = ~0ull;

// The process's record: mapped, page-locked host memory that every device can write to.
ErrorRecord* error_record();
// When a kernel left a record, clears it and throws PageTableError (a page), NotReady (what was
// waited for has not come), else InvalidArgument.
void report_errors();

// Throws Unsupported when there is no usable device, std::runtime_error for other failures.
void check_cuda(cudaError_t status, const char* what);

// A graph is being made of what is queued on `stream`: nothing of the host may be waited for or
// copied then.
bool is_captured(cudaStream_t stream);

}  // namespace kvlink::cuda
