// Waiting on the device for KV that is still arriving.
#pragma once

#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/ptx.cuh"
#include "kvlink/cuda/wait_ready.hpp"

namespace kvlink::cuda {

// For one thread. False, and an error, when the time has passed before all were ready.
__device__ inline bool wait_ready(const ReadyCounters& ready, ErrorRecord* errors) {
  if (ready.num_items == 0) return true;
  const uint64_t deadline = global_time_ns() + ready.timeout_ns;
  for (int i = 0; i < ready.num_items; ++i) {
    while (true) {
      const uint64_t landed = load_of_system(ready.items[i].counter);
      if (landed >= ready.items[i].target) break;
      if (global_time_ns() >= deadline) {
        record_error(errors, BadEntry::kReady, i, static_cast<int64_t>(landed));
        return false;
      }
      sleep_ns(500);
    }
  }
  return true;
}

}  // namespace kvlink::cuda
