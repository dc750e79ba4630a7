#pragma once

#include <cstdint>

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

KVLINK_SIMD_DECLARE(
    // Sums num_floats (a multiple of 256) floats.
    float probe_sum(const float* data, int64_t num_floats);
    // Runs rounds of independent FMAs and returns the operations done; `sink` keeps them.
    int64_t probe_fma(int64_t rounds, float* sink);
    // The same with products of pairs of bfloat16; 0 if there are none.
    int64_t probe_dot(int64_t rounds, float* sink);)

}  // namespace kvlink::cpu
