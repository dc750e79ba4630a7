#pragma once

#include <cstdint>
#include <vector>

#include "kvlink/base/segment.hpp"
#include "kvlink/base/simd_level.hpp"

namespace kvlink::cpu {

// What this machine can do with num_threads() threads: the limits that benchmarks compare with.
// Each runs for about `seconds` and returns the median rate; bytes and operations per second.
double probe_read_bandwidth(int64_t num_bytes,
                            double seconds);  // bytes read from num_bytes of memory
double probe_copy_bandwidth(int64_t num_bytes,
                            double seconds);  // bytes copied (each read and written)
double probe_fma_peak(double seconds);        // float32 operations; an FMA is two
// Operations on pairs of bfloat16 with float32 sums, four an element of the sum; 0 where the CPU or
// the SIMD level has no instruction for them.
double probe_dot_peak(double seconds);

// Two pieces of memory as pools have it. Each call copies or reads all of it once, in the order of
// its addresses, with num_threads() threads, so that a caller can take turns, call by call, between
// the limit and what is held against it.
class MemoryProbe {
 public:
  // Finds out, by turns, which way of copying is the fastest here.
  MemoryProbe(int64_t num_bytes, bool shared);

  double copy() { return copy(best_); }          // seconds
  double copy_plain() { return copy(kMemcpy); }  // by the C library's memcpy of 1 MiB at a time
  double read();                                 // of one of the two pieces
  int64_t size() const { return static_cast<int64_t>(source_.size()); }
  const char* copied_by() const;

 private:
  enum Way { kMemcpy, kStreaming, kNumWays };
  double copy(Way way);

  Segment source_, target_;
  std::vector<float> sinks_;
  Way best_ = kMemcpy;
};

KVLINK_SIMD_DECLARE(
    // Copies num_bytes (a multiple of 256) around the caches, between multiples of 64 bytes.
    void probe_stream(char* dst, const char* src, int64_t num_bytes);
    // Sums num_floats (a multiple of 256) floats.
    float probe_sum(const float* data, int64_t num_floats);
    // Runs rounds of independent FMAs and returns the operations done; `sink` keeps them.
    int64_t probe_fma(int64_t rounds, float* sink);
    // The same with products of pairs of bfloat16; 0 if there are none.
    int64_t probe_dot(int64_t rounds, float* sink);)

}  // namespace kvlink::cpu
