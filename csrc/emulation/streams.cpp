#include "emulation/streams.hpp"

#include <atomic>
#include <mutex>
#include <set>

namespace kvlink::emulation {

namespace {

std::atomic<long long> allocated = 0, freed = 0;
std::mutex mutex;
std::set<unsigned long long> busy;

}  // namespace

bool is_busy(unsigned long long stream) {
  const std::lock_guard lock(mutex);
  return busy.contains(stream);
}

void count_allocation() { ++allocated; }
void count_free() { ++freed; }

}  // namespace kvlink::emulation

extern "C" __attribute__((visibility("default"))) void kvlink_emulation_set_busy(
    unsigned long long stream, int is_busy) {
  const std::lock_guard lock(kvlink::emulation::mutex);
  is_busy ? (void)kvlink::emulation::busy.insert(stream)
          : (void)kvlink::emulation::busy.erase(stream);
}

extern "C" __attribute__((visibility("default"))) void kvlink_emulation_allocations(
    long long* made, long long* freed) {
  *made = kvlink::emulation::allocated;
  *freed = kvlink::emulation::freed;
}
