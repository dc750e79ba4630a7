// How a kernel leaves a record of what it skipped.
#pragma once

#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

__device__ inline void record_error(ErrorRecord* record, BadEntry argument, int64_t index,
                                    int64_t value) {
  index = index < kMaxErrorIndex ? index : kMaxErrorIndex;
  value = value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value;
  const ErrorRecord seen = static_cast<ErrorRecord>(argument) << 60 |
                           static_cast<ErrorRecord>(index) << 32 | static_cast<uint32_t>(value);
  auto* shared = const_cast<volatile ErrorRecord*>(record);
  if (seen < *shared) *shared = seen;
}

}  // namespace kvlink::cuda
