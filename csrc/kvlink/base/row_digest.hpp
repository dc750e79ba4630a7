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
//   base:        mix(layer << 32 | head), + (plane + 1) * kStep + row_bytes * kGolden, mixed
//   start:       of lane j: mix(base + key(8 + j))
//   shift:       token_position * kGolden, and if the row has a scale of its own (granularity
//                token_head): + (2^32 | bits of the scale) * kStep
//   row digest:  sum over j of mix(acc[j] ^ (start[j] + shift))
//
// The lanes never meet before the sum over rows, so vectors of lanes add up row after row.
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

// Of all rows of one head in one plane.
KVLINK_HD uint64_t base(int32_t layer, int32_t head, int plane, int64_t row_bytes) {
  const uint64_t coordinates =
      static_cast<uint64_t>(static_cast<uint32_t>(layer)) << 32 | static_cast<uint32_t>(head);
  return mix(mix(coordinates) + static_cast<uint64_t>(plane + 1) * kStep +
             static_cast<uint64_t>(row_bytes) * kGolden);
}

KVLINK_HD uint64_t start(uint64_t base, int j) { return mix(base + key(8 + j)); }

KVLINK_HD uint64_t shift(int64_t token_position) {
  return static_cast<uint64_t>(token_position) * kGolden;
}

KVLINK_HD uint64_t scale_shift(uint32_t scale_bits) {
  return (uint64_t{1} << 32 | scale_bits) * kStep;
}

KVLINK_HD uint64_t finish(uint64_t acc, uint64_t start, uint64_t shift) {
  return mix(acc ^ (start + shift));
}

}  // namespace kvlink::row_digest
