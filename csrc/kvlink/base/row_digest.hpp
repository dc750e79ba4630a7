// The digest of one row, host and device. docs/kv_layout.md specifies it; python_tests hold a
// second implementation against this one.
//
// A row is one KV head of one token in one plane (0: K, 1: V) of one layer; its bytes are its
// stored elements in order. The digest of many rows is the wrapping sum of theirs.
//
//   mix(x):      x ^= x >> 30; x *= 0xbf58476d1ce4e5b9; x ^= x >> 27; x *= 0x94d049bb133111eb;
//                x ^= x >> 31
//   key(j):      mix(kGolden * (j + 1)), j = 0..15
//   words:       the bytes, padded with zeros to whole stripes of 64, read as little-endian uint64;
//                word j of stripe s is w, and x = w ^ (key(j) + s * kStep)
//   lanes:       acc[j] += low32(x) * high32(x);  acc[j ^ 1] += w;  all from 0, modulo 2^64
//   fold:        sum over p = 0..3 of low64(m) ^ high64(m), where
//                m = (acc[2p] ^ key(8 + 2p)) * (acc[2p + 1] ^ key(9 + 2p)) in 128 bits
//   row:         mix(layer << 32 | head), + (plane + 1) * kStep + row_bytes * kGolden, mixed: base
//   seed:        mix(base + token_position * kGolden), and if the row has a scale of its own
//                (granularity token_head): mix(seed ^ (2^32 | bits of the scale))
//   row digest:  mix(fold ^ seed)
#pragma once

#include <cstdint>

#include "kvlink/base/hd.hpp"

namespace kvlink::row_digest {

inline constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
inline constexpr uint64_t kStep = 0xd1b54a32d192ed03;
inline constexpr int kStripeBytes = 64;
inline constexpr int kLanes = 8;

KVLINK_HD constexpr uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9;
  x ^= x >> 27;
  x *= 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

KVLINK_HD constexpr uint64_t key(int j) { return mix(kGolden * static_cast<uint64_t>(j + 1)); }

KVLINK_HD uint64_t multiply_fold(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return (a * b) ^ __umul64hi(a, b);
#else
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
#endif
}

KVLINK_HD uint64_t fold(const uint64_t acc[kLanes]) {
  return multiply_fold(acc[0] ^ key(8), acc[1] ^ key(9)) +
         multiply_fold(acc[2] ^ key(10), acc[3] ^ key(11)) +
         multiply_fold(acc[4] ^ key(12), acc[5] ^ key(13)) +
         multiply_fold(acc[6] ^ key(14), acc[7] ^ key(15));
}

// Of all rows of one head in one plane.
KVLINK_HD uint64_t base(int32_t layer, int32_t head, int plane, int64_t row_bytes) {
  const uint64_t coordinates =
      static_cast<uint64_t>(static_cast<uint32_t>(layer)) << 32 | static_cast<uint32_t>(head);
  return mix(mix(coordinates) + static_cast<uint64_t>(plane + 1) * kStep +
             static_cast<uint64_t>(row_bytes) * kGolden);
}

KVLINK_HD uint64_t seed(uint64_t base, int64_t token_position) {
  return mix(base + static_cast<uint64_t>(token_position) * kGolden);
}

KVLINK_HD uint64_t seed_with_scale(uint64_t seed, uint32_t scale_bits) {
  return mix(seed ^ (uint64_t{1} << 32 | scale_bits));
}

KVLINK_HD uint64_t finish(uint64_t fold, uint64_t seed) { return mix(fold ^ seed); }

}  // namespace kvlink::row_digest
