// KV that is still arriving: what an operator waits for before it reads it.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace kvlink {

// The bound of a wait passed. Python: kvlink.errors.NotReady (a TimeoutError).
struct NotReady : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What was waited for ended without arriving. Python: kvlink.errors.NeverReady.
struct NeverReady : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A counter that whoever writes the KV raises, perhaps in another process. Ready: the counter has
// reached its target while the transfer was alive, or the transfer is known to have arrived.
struct Readiness {
  const std::atomic<uint64_t>* landed = nullptr;  // rows, never falling while alive
  uint64_t target = 0;
  const std::atomic<uint64_t>* state = nullptr;  // alive: (state & alive_mask) == alive
  uint64_t alive_mask = 0, alive = 0;
  const std::atomic<uint32_t>* changes = nullptr;  // futex, bumped after each change of the above
  const std::atomic<uint32_t>* arrived = nullptr;  // not 0: it did, whatever the state says by now
  std::atomic<int64_t>* waited_ns = nullptr;       // raised by the time spent waiting; nullable
  const char* name = "";                           // for messages
  const char* (*why)(uint64_t state) = nullptr;    // how it ended, for messages; nullable
};

// What an operator waits for before it reads: all of the items, until the deadline.
struct ReadyWait {
  const Readiness* const* items = nullptr;  // [num_items]
  int64_t num_items = 0;
  int64_t deadline_ns = 0;       // CLOCK_MONOTONIC
  void (*on_slice)() = nullptr;  // called at least every 100 ms of waiting, may throw; nullable
};

// Without waiting. Throws NeverReady.
bool is_ready(const Readiness& readiness);

// Throws NotReady, NeverReady.
void wait_ready(const ReadyWait& wait);

}  // namespace kvlink
