#include "kvlink/cpu/probes.hpp"
#include "kvlink/cpu/simd/pair_rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"
#include "kvlink/cpu/simd/words.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

void probe_stream(char* dst, const char* src, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 256) {
    Words words[4];
    KVLINK_UNROLL
    for (int j = 0; j < 4; ++j) words[j] = Words::load(src + i + 64 * j);
    KVLINK_UNROLL
    for (int j = 0; j < 4; ++j) words[j].stream(dst + i + 64 * j);
  }
  finish_streams();
}

float probe_sum(const float* data, int64_t num_floats) {
  constexpr int kSums = 8;
  constexpr int64_t kAhead = 4096;
  Vec sums[kSums] = {};
  for (int64_t i = 0; i < num_floats; i += kSums * kLanes) {
    for (int64_t line = 0; line < kSums * kLanes; line += 16) {
      __builtin_prefetch(reinterpret_cast<const char*>(data + i + line) + kAhead);
    }
    KVLINK_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] += load(data + i + s * kLanes);
  }
  Vec total{};
  for (const Vec& sum : sums) total += sum;
  return sum_lanes(total);
}

int64_t probe_fma(int64_t rounds, float* sink) {
#if defined(__AVX512F__)
  constexpr int kSums = 24;  // as many as there are registers, and more than the latency needs
#else
  constexpr int kSums = 12;
#endif
  Vec sums[kSums];
  KVLINK_UNROLL
  for (int s = 0; s < kSums; ++s) sums[s] = splat(*sink + static_cast<float>(s));  // all different
  Vec factor = splat(0.999f), addend = splat(0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
    __asm__ volatile("" : "+m"(*sink));  // rounds are not merged
    KVLINK_UNROLL
    for (int s = 0; s < kSums; ++s) sums[s] = sums[s] * factor + addend;
  }
  Vec total{};
  KVLINK_UNROLL
  for (int s = 0; s < kSums; ++s) total += sums[s];
  *sink += sum_lanes(total);
  return rounds * kSums * kLanes * 2;
}

int64_t probe_dot(int64_t rounds, float* sink) {
#if defined(__AVX512F__)
  if (!has_pair_products()) return 0;
  constexpr int kSums = 24;
  Vec sums[kSums] = {};
  const Vec left = from_bits(VecU{} + 0x3f003f00u), right = left;  // 0.5 everywhere
  for (int64_t round = 0; round < rounds; ++round) {
    KVLINK_UNROLL
    for (int s = 0; s < kSums; ++s) PairTerms::add(sums[s], left, right);
  }
  Vec total{};
  KVLINK_UNROLL
  for (int s = 0; s < kSums; ++s) total += sums[s];
  *sink += sum_lanes(total);
  return rounds * kSums * kLanes * 4;
#else
  (void)rounds, (void)sink;
  return 0;
#endif
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
