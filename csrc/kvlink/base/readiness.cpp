#include "kvlink/base/readiness.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "kvlink/base/check.hpp"

namespace kvlink {

namespace {

constexpr int64_t kSlice = 100'000'000;  // ns

int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

void wait_one(const Readiness& item, const ReadyWait& wait) {
  if (is_ready(item)) return;
  const int64_t began = now_ns();
  const auto account = [&] {
    if (item.waited_ns) item.waited_ns->fetch_add(now_ns() - began);
  };
  try {
    while (true) {
      const uint32_t seen = item.changes->load();
      if (is_ready(item)) break;
      const int64_t left = wait.deadline_ns - now_ns();
      if (left <= 0) {
        throw NotReady(concat(item.name, ": ", item.landed->load(), " of ", item.target,
                              " rows are there when the time to wait is over"));
      }
      const int64_t slice = std::min(left, kSlice);
      const timespec timeout{slice / 1'000'000'000, slice % 1'000'000'000};
      syscall(SYS_futex, item.changes, FUTEX_WAIT, seen, &timeout, nullptr, 0);
      if (wait.on_slice) wait.on_slice();
    }
  } catch (...) {
    account();
    throw;
  }
  account();
}

}  // namespace

bool is_ready(const Readiness& item) {
  const auto arrived = [&] { return item.arrived && item.arrived->load() != 0; };
  if (arrived()) return true;
  // The state is read after the counter: where the transfer still is alive, so was the counter.
  const bool complete = item.landed->load() >= item.target;
  const uint64_t state = item.state->load();
  if ((state & item.alive_mask) == item.alive) return complete;
  // It may have arrived, and what held its state have gone to another one.
  if (arrived()) return true;
  throw NeverReady(
      concat(item.name, ": will not arrive: ", item.why ? item.why(state) : "it ended"));
}

void wait_ready(const ReadyWait& wait) {
  for (int64_t idx = 0; idx < wait.num_items; ++idx) wait_one(*wait.items[idx], wait);
}

}  // namespace kvlink
