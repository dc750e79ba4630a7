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
  const float* value_factors;  // [kPanelRows] of the weights; null: 1
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

// Vectors of up to kLanes rows, of which lanes are then added up or compared.
struct Partials {
  alignas(64) float at[kLanes * kLanes];
  KVLINK_INLINE void set(int64_t row, Vec value) { store(at + row * kLanes, value); }
};

// Lane i: each(..) over all lanes of row i, in the order of sum_lanes.
template <class Each>
KVLINK_INLINE Vec fold_lanes(const Partials& rows, int64_t count, const Each& each) {
#if defined(__AVX512F__)
  if (count > 4) {
    // Rows in an order in which their results come out in theirs.
    Vec part[kLanes];
    KVLINK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const int row = (i & 12) | (i & 2) >> 1 | (i & 1) << 1;
      part[i] = load(rows.at + ((row & 3) | (row & 4) << 1 | (row & 8) >> 1) * kLanes);
    }
    KVLINK_UNROLL
    for (int i = 0; i < 8; ++i) {
      const auto a = (__m512)part[i], b = (__m512)part[i + 8];
      part[i] = each((Vec)_mm512_shuffle_f32x4(a, b, 0x44), (Vec)_mm512_shuffle_f32x4(a, b, 0xee));
    }
    KVLINK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto a = (__m512)part[i], b = (__m512)part[i + 4];
      part[i] = each((Vec)_mm512_shuffle_f32x4(a, b, 0x88), (Vec)_mm512_shuffle_f32x4(a, b, 0xdd));
    }
    KVLINK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const auto a = (__m512)part[i], b = (__m512)part[i + 2];
      part[i] = each((Vec)_mm512_shuffle_ps(a, b, 0x44), (Vec)_mm512_shuffle_ps(a, b, 0xee));
    }
    const auto a = (__m512)part[0], b = (__m512)part[1];
    return each((Vec)_mm512_shuffle_ps(a, b, 0x88), (Vec)_mm512_shuffle_ps(a, b, 0xdd));
  }
#endif
  Vec folded{};
  for (int64_t row = 0; row < count; ++row) {
    Vec v = load(rows.at + row * kLanes);
    if constexpr (kLanes > 8) v = each(v, exchange_lanes<kLanes / 2>(v));
    if constexpr (kLanes > 4) v = each(v, exchange_lanes<4>(v));
    v = each(v, exchange_lanes<2>(v));
    v = each(v, exchange_lanes<1>(v));
    folded[row] = v[0];
  }
  return folded;
}

// Scores as the softmax takes them; -inf where a position is not seen, whatever K holds there.
// Returns the largest of each lane.
template <bool kPlain>
KVLINK_INLINE Vec finish_scores(const SoftenRows& s, int64_t row) {
  constexpr uint64_t kLaneBits = (uint64_t{1} << kLanes) - 1;
  float* scores = s.scores + row * kPanelRows;
  Vec largest = splat(kNegInf);
  const VecI lane_bit = splat(int32_t{1}) << lane_indices();
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    Vec x = load(scores + v * kLanes) * load(s.key_factors + v * kLanes);
    if (!kPlain && s.softcap > 0.0f) x = tanh(x / s.softcap) * s.softcap;
    if (!kPlain && s.slopes) {
      const VecI position = lane_indices() + static_cast<int32_t>(v * kLanes);
      const Vec distance = __builtin_convertvector(position, Vec) + s.distances[row / s.group];
      x += distance * s.slopes[row % s.group];
    }
    if (!kPlain && s.seen != ~uint64_t{0}) {
      const VecI bits = splat(static_cast<int32_t>(s.seen >> (v * kLanes) & kLaneBits));
      x = select((bits & lane_bit) != 0, x, splat(kNegInf));
    }
    largest = max(largest, x);
    store(scores + v * kLanes, x);
  }
  return largest;
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

// Scores become weights. Returns the sum of each lane.
KVLINK_INLINE Vec weigh(const SoftenRows& s, int64_t row) {
  float* scores = s.scores + row * kPanelRows;
  // Where every visible score is -inf, so is the largest; the weights are 0.
  const float max = s.max[row] == kNegInf ? 0.0f : s.max[row];
  Vec weights[kVecs];
  Vec sum = Vec{};
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    const Vec weight = exp(load(scores + v * kLanes) - max);
    sum += weight;
    weights[v] = s.value_factors ? weight * load(s.value_factors + v * kLanes) : weight;
  }
#if defined(__AVX512F__)
  if (s.weights == Weights::kPairs) {
    KVLINK_UNROLL
    for (int64_t v = 0; v < kVecs; v += 2) {
      store_unaligned(scores + v / 2 * kLanes, narrow_to_words(weights[v], weights[v + 1]));
    }
    return sum;
  }
#endif
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    const Vec weight = weights[v];
    store(scores + v * kLanes,
          s.weights == Weights::kFloats ? weight : from_bits(narrow_to_bfloat16(weight) << 16));
  }
  return sum;
}

}  // namespace soften

// Rows do not wait for each other: the largest scores of a few first, then their weights.
inline __attribute__((noinline)) void soften_rows(const SoftenRows& rows) {
  const SoftenRows s = rows;  // which no store changes
  const bool plain = s.softcap == 0.0f && !s.slopes && s.seen == ~uint64_t{0};
  soften::Partials partials{};
  for (int64_t first = 0; first < s.num_rows; first += kLanes) {
    const int64_t count = s.num_rows - first < kLanes ? s.num_rows - first : kLanes;
    for (int64_t i = 0; i < count; ++i) {
      partials.set(i, plain ? soften::finish_scores<true>(s, first + i)
                            : soften::finish_scores<false>(s, first + i));
    }
    const Vec block_max =
        soften::fold_lanes(partials, count, [](Vec a, Vec b) { return max(a, b); });
    const Vec old_max = soften::load_lanes(s.max + first, count);
    const Vec new_max = max(old_max, block_max);
    const Vec scale = select(old_max == new_max, splat(1.0f), exp(old_max - new_max));
    soften::store_lanes(s.max + first, new_max, count);
    soften::store_lanes(s.row_scale + first, scale, count);
    for (int64_t i = 0; i < count; ++i) partials.set(i, soften::weigh(s, first + i));
    const Vec sum = soften::fold_lanes(partials, count, [](Vec a, Vec b) { return a + b; });
    const Vec old_sum = soften::load_lanes(s.sum + first, count);
    soften::store_lanes(s.sum + first, old_sum * scale + sum, count);
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
