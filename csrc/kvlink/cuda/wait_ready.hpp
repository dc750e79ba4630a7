// KV that is still arriving, for kernels: counters that whoever writes it raises.
#pragma once

#include <cstdint>

namespace kvlink::cuda {

struct ReadyCounter {
  const uint64_t* counter = nullptr;  // device memory, or host memory that the device maps
  uint64_t target = 0;                // ready: the counter has reached it
};

inline constexpr int kMaxReady = 16;

// A kernel that reads KV waits for all of them, at most timeout_ns; then it reads nothing, and
// leaves NotReady in the error record.
struct ReadyCounters {
  ReadyCounter items[kMaxReady];
  int32_t num_items = 0;
  uint64_t timeout_ns = 0;
};

// Each of them grows by one when all that a call stores is there.
struct RaisedCounters {
  uint64_t* items[kMaxReady] = {};
  int32_t num_items = 0;
};

}  // namespace kvlink::cuda
