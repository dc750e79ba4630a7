// From a block's scores to weights, for rows that see the same positions. Included by *_simd.cpp
// only.
#pragma once

#include "kvlink/cpu/simd/math.hpp"
#include "kvlink/cpu/simd/pack_rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// What becomes of weights before they meet V: they stay floats, are rounded to bfloat16 (the sum of
// weights is not), or that as pairs of positions.
enum class Weights { kFloats, kRounded, kPairs };

struct SoftenRows {
  float* scores;  // [num_rows, kPanelRows] products of q and K; becomes the weights
  int64_t num_rows;
  const float* key_factors;    // [kPanelRows] of the scores
  const float* value_factors;  // [kPanelRows] of the weights
  uint64_t seen;               // bit i: the rows see position i
  float softcap;               // 0: none
  const float* slopes;         // [group] of ALiBi, row by row over and over; null: none
  int64_t group;
  const float* distances;  // [num_rows / group] from the query to position 0; with slopes
  Weights weights;
  float* max;        // [num_rows] of what the rows have seen; updated
  float* sum;        // [num_rows] of its weights; updated
  float* row_scale;  // [num_rows] factor that brings what was gathered under the new max
};

namespace soften {

constexpr float kNegInf = -__builtin_inff();
constexpr int64_t kVecs = kPanelRows / kLanes;

// Scores as the softmax takes them; -inf where a position is not seen, whatever K holds there.
KVLINK_INLINE void finish_scores(const SoftenRows& s, int64_t row) {
  constexpr uint64_t kLaneBits = (uint64_t{1} << kLanes) - 1;
  float* scores = s.scores + row * kPanelRows;
  Vec largest = splat(kNegInf);
  const VecI lane_bit = splat(int32_t{1}) << lane_indices();
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    Vec x = load(scores + v * kLanes) * load(s.key_factors + v * kLanes);
    if (s.softcap > 0.0f) x = tanh(x / s.softcap) * s.softcap;
    if (s.slopes) {
      const VecI position = lane_indices() + static_cast<int32_t>(v * kLanes);
      const Vec distance = __builtin_convertvector(position, Vec) + s.distances[row / s.group];
      x += distance * s.slopes[row % s.group];
    }
    if (s.seen != ~uint64_t{0}) {
      const VecI bits = splat(static_cast<int32_t>(s.seen >> (v * kLanes) & kLaneBits));
      x = select((bits & lane_bit) != 0, x, splat(kNegInf));
    }
    largest = max(largest, x);
    store(scores + v * kLanes, x);
  }
  s.row_scale[row] = max_lanes(largest);
}

// The first `count` lanes, zeros after them.
KVLINK_INLINE Vec load_lanes(const float* source, int64_t count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((1u << count) - 1, source);
#else
  Vec value{};
  __builtin_memcpy(&value, source, count * sizeof(float));
  return value;
#endif
}
KVLINK_INLINE void store_lanes(float* target, Vec value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, (1u << count) - 1, (__m512)value);
#else
  __builtin_memcpy(target, &value, count * sizeof(float));
#endif
}

// From the largest scores of the block to the new largest of all, and to row_scale.
KVLINK_INLINE void update_max(const SoftenRows& s, int64_t row, int64_t count) {
  const Vec old_max = load_lanes(s.max + row, count);
  const Vec block_max = load_lanes(s.row_scale + row, count);
  const Vec new_max = max(old_max, block_max);
  const Vec scale = select(old_max == new_max, splat(1.0f), exp(old_max - new_max));
  store_lanes(s.max + row, new_max, count);
  store_lanes(s.row_scale + row, scale, count);
}

KVLINK_INLINE void weigh(const SoftenRows& s, int64_t row) {
  float* scores = s.scores + row * kPanelRows;
  // Where every visible score is -inf, so is the largest; the weights are 0.
  const float max = s.max[row] == kNegInf ? 0.0f : s.max[row];
  Vec weights[kVecs];
  Vec sum = Vec{};
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    const Vec weight = exp(load(scores + v * kLanes) - max);
    sum += weight;
    weights[v] = weight * load(s.value_factors + v * kLanes);
  }
  s.sum[row] = s.sum[row] * s.row_scale[row] + sum_lanes(sum);
#if defined(__AVX512F__)
  if (s.weights == Weights::kPairs) {
    KVLINK_UNROLL
    for (int64_t v = 0; v < kVecs; v += 2) {
      store_unaligned(scores + v / 2 * kLanes, narrow_to_words(weights[v], weights[v + 1]));
    }
    return;
  }
#endif
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    const Vec weight = weights[v];
    store(scores + v * kLanes,
          s.weights == Weights::kFloats ? weight : from_bits(narrow_to_bfloat16(weight) << 16));
  }
}

}  // namespace soften

// Rows do not wait for each other: their largest scores first, then their weights.
inline __attribute__((noinline)) void soften_rows(const SoftenRows& s) {
  for (int64_t row = 0; row < s.num_rows; ++row) soften::finish_scores(s, row);
  for (int64_t row = 0; row < s.num_rows; row += kLanes) {
    soften::update_max(s, row, s.num_rows - row < kLanes ? s.num_rows - row : kLanes);
  }
  for (int64_t row = 0; row < s.num_rows; ++row) soften::weigh(s, row);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
