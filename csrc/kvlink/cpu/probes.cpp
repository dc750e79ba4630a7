#include "kvlink/cpu/probes.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/segment.hpp"
#include "kvlink/base/threads.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kChunkBytes = 1 << 20;

// The median of repeated runs of `work`, as work done a second: a limit and what is held against it
// are taken the same way, so that neither profits from a lucky moment.
double median_rate(double seconds, const std::function<double()>& work) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  std::vector<double> rates;
  do {
    const auto begin = Clock::now();
    const double amount = work();
    rates.push_back(amount / std::chrono::duration<double>(Clock::now() - begin).count());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
  return rates[rates.size() / 2];
}

int64_t checked_chunks(int64_t num_bytes, double seconds) {
  KVLINK_CHECK(num_bytes >= kChunkBytes, "num_bytes: expected at least ", kChunkBytes, "; got ",
               num_bytes);
  KVLINK_CHECK(seconds >= 0.0 && seconds <= 60.0, "seconds: expected 0 to 60; got ", seconds);
  return num_bytes / kChunkBytes;
}

}  // namespace

double probe_read_bandwidth(int64_t num_bytes, double seconds) {
  const int64_t chunks = checked_chunks(num_bytes, seconds);
  const Segment memory = Segment::create(chunks * kChunkBytes, false);
  std::memset(memory.data(), 1, memory.size());
  const auto sum = KVLINK_SIMD_PICK(probe_sum);
  std::vector<float> sinks(chunks);
  return median_rate(seconds, [&] {
    parallel_for(chunks, [&](int64_t chunk) {
      const auto* data = reinterpret_cast<const float*>(memory.data() + chunk * kChunkBytes);
      sinks[chunk] = sum(data, kChunkBytes / 4);
    });
    return static_cast<double>(memory.size());
  });
}

double probe_copy_bandwidth(int64_t num_bytes, double seconds) {
  const int64_t chunks = checked_chunks(num_bytes, seconds);
  const Segment source = Segment::create(chunks * kChunkBytes, false);
  const Segment target = Segment::create(chunks * kChunkBytes, false);
  std::memset(source.data(), 1, source.size());
  std::memset(target.data(), 2, target.size());
  return median_rate(seconds, [&] {
    parallel_for(chunks, [&](int64_t chunk) {
      const int64_t offset = chunk * kChunkBytes;
      std::memcpy(target.data() + offset, source.data() + offset, kChunkBytes);
    });
    return static_cast<double>(source.size());
  });
}

namespace {

double arithmetic_peak(int64_t (*run)(int64_t, float*), double seconds) {
  KVLINK_CHECK(seconds >= 0.0 && seconds <= 60.0, "seconds: expected 0 to 60; got ", seconds);
  constexpr int64_t kRounds = 200000;
  const int64_t tasks = num_threads();
  std::vector<int64_t> done(tasks);
  std::vector<float> sinks(tasks * 16);
  return median_rate(seconds, [&] {
    parallel_for(tasks, [&](int64_t task) { done[task] = run(kRounds, &sinks[task * 16]); });
    double total = 0.0;
    for (const int64_t operations : done) total += static_cast<double>(operations);
    return total;
  });
}

}  // namespace

double probe_fma_peak(double seconds) {
  return arithmetic_peak(KVLINK_SIMD_PICK(probe_fma), seconds);
}

double probe_dot_peak(double seconds) {
  return arithmetic_peak(KVLINK_SIMD_PICK(probe_dot), seconds);
}

}  // namespace kvlink::cpu
