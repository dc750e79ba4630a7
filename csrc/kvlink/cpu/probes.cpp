#include "kvlink/cpu/probes.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/threads.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kChunkBytes = 1 << 20;

using Clock = std::chrono::steady_clock;

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double seconds_of(const std::function<void()>& work) {
  const auto begin = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The median of what repeated calls of `rate` return: a limit and what is held against it are taken
// the same way, so that neither profits from a lucky moment.
double median_rate(double seconds, const std::function<double()>& rate) {
  const auto start = Clock::now();
  std::vector<double> rates;
  do {
    rates.push_back(rate());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return median(rates);
}

int64_t checked_chunks(int64_t num_bytes) {
  KVLINK_CHECK(num_bytes >= kChunkBytes, "num_bytes: expected at least ", kChunkBytes, "; got ",
               num_bytes);
  return num_bytes / kChunkBytes;
}

void check_seconds(double seconds) {
  KVLINK_CHECK(seconds >= 0.0 && seconds <= 60.0, "seconds: expected 0 to 60; got ", seconds);
}

}  // namespace

MemoryProbe::MemoryProbe(int64_t num_bytes, bool shared)
    : source_(Segment::create(checked_chunks(num_bytes) * kChunkBytes, shared)),
      target_(Segment::create(checked_chunks(num_bytes) * kChunkBytes, shared)),
      sinks_(checked_chunks(num_bytes)) {
  constexpr int kTurns = 9;
  std::memset(source_.data(), 1, source_.size());
  std::memset(target_.data(), 2, target_.size());
  std::vector<double> shares;
  for (int i = 0; i < kTurns; ++i) {
    double times[kNumWays];
    for (const Way way : {kMemcpy, kStreaming}) {
      copy(way);  // what the other one left in the caches is written back
      times[way] = copy(way);
    }
    shares.push_back(times[kMemcpy] / times[kStreaming]);
  }
  if (median(shares) > 1.0) best_ = kStreaming;
}

const char* MemoryProbe::copied_by() const {
  return best_ == kStreaming ? "streaming stores" : "memcpy";
}

double MemoryProbe::copy(Way way) {
  const auto stream = KVLINK_SIMD_PICK(probe_stream);
  return seconds_of([&] {
    parallel_for(std::ssize(sinks_), [&](int64_t chunk) {
      auto* target = reinterpret_cast<char*>(target_.data()) + chunk * kChunkBytes;
      const auto* source = reinterpret_cast<const char*>(source_.data()) + chunk * kChunkBytes;
      if (way == kStreaming) {
        stream(target, source, kChunkBytes);
      } else {
        std::memcpy(target, source, kChunkBytes);
      }
    });
  });
}

double MemoryProbe::read() {
  const auto sum = KVLINK_SIMD_PICK(probe_sum);
  return seconds_of([&] {
    parallel_for(std::ssize(sinks_), [&](int64_t chunk) {
      const auto* data = reinterpret_cast<const float*>(source_.data() + chunk * kChunkBytes);
      sinks_[chunk] = sum(data, kChunkBytes / 4);
    });
  });
}

double probe_read_bandwidth(int64_t num_bytes, double seconds) {
  check_seconds(seconds);
  MemoryProbe probe(num_bytes, false);
  return median_rate(seconds, [&] { return probe.size() / probe.read(); });
}

double probe_copy_bandwidth(int64_t num_bytes, double seconds) {
  check_seconds(seconds);
  MemoryProbe probe(num_bytes, false);
  return median_rate(seconds, [&] { return probe.size() / probe.copy(); });
}

namespace {

double arithmetic_peak(int64_t (*run)(int64_t, float*), double seconds) {
  check_seconds(seconds);
  constexpr int64_t kRounds = 200000;
  const int64_t tasks = num_threads();
  std::vector<int64_t> done(tasks);
  std::vector<float> sinks(tasks * 16);
  return median_rate(seconds, [&] {
    const double taken = seconds_of([&] {
      parallel_for(tasks, [&](int64_t task) { done[task] = run(kRounds, &sinks[task * 16]); });
    });
    double total = 0.0;
    for (const int64_t operations : done) total += static_cast<double>(operations);
    return total / taken;
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
