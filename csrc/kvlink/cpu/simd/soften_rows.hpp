// From a block's scores to weights. Included by *_simd.cpp only.
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
  const uint64_t* seen;        // [num_rows / group] bit i: the rows see position i
  float softcap;               // 0: none
  const float* slopes;         // [group] of ALiBi, row by row over and over; null: none
  int64_t group;               // rows that follow each other and see the same
  const float* distances;      // [num_rows / group] from the query to position 0; with slopes
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
  // Rows beside `count` that fold_lanes looks at, too.
  KVLINK_INLINE void fill(int64_t count) {
    for (; count < kLanes && count != 4; ++count) set(count, Vec{});
  }
};

#if defined(__AVX512F__)
// Of four rows from `first` on: lane i of every 128-bit part is each(..) over that part of row i.
template <class Each>
KVLINK_INLINE __m512 fold_four(const Partials& rows, int64_t first, const Each& each) {
  __m512 row[4];
  KVLINK_UNROLL
  for (int i = 0; i < 4; ++i) row[i] = (__m512)load(rows.at + (first + i) * kLanes);
  const auto halved = [&](__m512 a, __m512 b) __attribute__((always_inline)) {
    return (__m512)each((Vec)_mm512_shuffle_ps(a, b, 0x88), (Vec)_mm512_shuffle_ps(a, b, 0xdd));
  };
  return halved(halved(row[0], row[1]), halved(row[2], row[3]));
}
#endif

// Lane i: each(..) over all lanes of row i: neighbours first, those furthest apart last.
template <class Each>
KVLINK_INLINE Vec fold_lanes(const Partials& rows, int64_t count, const Each& each) {
#if defined(__AVX512F__)
  const auto halved = [&](__m512 a, __m512 b) __attribute__((always_inline)) {
    return (__m512)each((Vec)_mm512_shuffle_f32x4(a, b, 0x88),
                        (Vec)_mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const __m512 first = fold_four(rows, 0, each);
  if (count <= 4) {
    const __m512 half = halved(first, first);
    return (Vec)halved(half, half);
  }
  const __m512 half = halved(first, fold_four(rows, 4, each));
  return (Vec)halved(half, halved(fold_four(rows, 8, each), fold_four(rows, 12, each)));
#else
  Vec folded{};
  for (int64_t row = 0; row < count; ++row) {
    Vec v = load(rows.at + row * kLanes);
    v = each(v, exchange_lanes<1>(v));
    v = each(v, exchange_lanes<2>(v));
    if constexpr (kLanes > 4) v = each(v, exchange_lanes<4>(v));
    folded[row] = v[0];
  }
  return folded;
#endif
}

// The largest score of each lane.
KVLINK_INLINE Vec largest_of(const SoftenRows& s, int64_t row) {
  const float* scores = s.scores + row * kPanelRows;
  Vec largest = splat(kNegInf);
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    largest = max(largest, load(scores + v * kLanes) * load(s.key_factors + v * kLanes));
  }
  return largest;
}

// Scores as the softmax takes them; -inf where a position is not seen, whatever K holds there.
// Returns the largest of each lane.
KVLINK_INLINE Vec finish_scores(const SoftenRows& s, int64_t row, uint64_t seen) {
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
    const VecI bits = splat(static_cast<int32_t>(seen >> (v * kLanes) & kLaneBits));
    x = select((bits & lane_bit) != 0, x, splat(kNegInf));
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

// Scores become weights. Returns the sum of each lane. Not kFinished: only the factors of K are
// missing.
template <bool kPairs, bool kScaled, bool kFinished>
KVLINK_INLINE Vec weigh(const SoftenRows& s, int64_t row, float largest) {
  float* scores = s.scores + row * kPanelRows;
  Vec weights[kVecs];
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    const Vec score = load(scores + v * kLanes);
    const Vec factor = load(s.key_factors + v * kLanes);
    weights[v] = kFinished ? score - largest : score * factor - largest;
  }
  exp_each<false>(weights);
  Vec sum = weights[0];
  KVLINK_UNROLL
  for (int64_t v = 1; v < kVecs; ++v) sum += weights[v];
  KVLINK_UNROLL
  for (int64_t v = 0; kScaled && v < kVecs; ++v) weights[v] *= load(s.value_factors + v * kLanes);
#if defined(__AVX512F__)
  if constexpr (kPairs) {
    KVLINK_UNROLL
    for (int64_t v = 0; v < kVecs; v += 2) {
      store_unaligned(scores + v / 2 * kLanes, narrow_to_words(weights[v], weights[v + 1]));
    }
    return sum;
  }
#endif
  KVLINK_UNROLL
  for (int64_t v = 0; v < kVecs; ++v) {
    const bool floats = s.weights == Weights::kFloats;
    store(scores + v * kLanes,
          floats ? weights[v] : from_bits(narrow_to_bfloat16(weights[v]) << 16));
  }
  return sum;
}

// Up to kLanes rows whose largest scores are known.
struct FewRows {
  int64_t first, count;
  bool any_finished;
  bool finished[kLanes];  // their scores are; of others only the largest is known
  alignas(64) float largest[kLanes];
  alignas(64) float scale[kLanes];
};

// What is done to a row depends on what it sees alone, whichever rows are beside it.
template <bool kSimple>
KVLINK_INLINE void find_largest(const SoftenRows& s, int64_t token, int64_t left, FewRows& few) {
  Partials partials;
  few.any_finished = false;
  for (int64_t i = 0; i < few.count; ++i) {
    few.finished[i] = !kSimple || s.seen[token] != ~uint64_t{0};
    few.any_finished = few.any_finished || few.finished[i];
    partials.set(i, few.finished[i] ? finish_scores(s, few.first + i, s.seen[token])
                                    : largest_of(s, few.first + i));
    if (--left == 0) ++token, left = s.group;
  }
  partials.fill(few.count);
  const auto max_of = [](Vec a, Vec b) { return max(a, b); };
  const Vec old_max = load_lanes(s.max + few.first, few.count);
  const Vec new_max = max(old_max, fold_lanes(partials, few.count, max_of));
  const Vec scale = select(old_max == new_max, splat(1.0f), exp(old_max - new_max));
  store_lanes(s.max + few.first, new_max, few.count);
  store_lanes(s.row_scale + few.first, scale, few.count);
  store(few.scale, scale);
  // Where every visible score is -inf, so is the largest; the weights are 0.
  store(few.largest, select(new_max == splat(kNegInf), Vec{}, new_max));
}

template <bool kPairs, bool kScaled, bool kAnyFinished>
KVLINK_INLINE void weigh_few(const SoftenRows& s, const FewRows& few) {
  Partials partials;
  for (int64_t i = 0; i < few.count; ++i) {
    if (kAnyFinished && few.finished[i]) {
      partials.set(i, weigh<kPairs, kScaled, true>(s, few.first + i, few.largest[i]));
    } else {
      partials.set(i, weigh<kPairs, kScaled, false>(s, few.first + i, few.largest[i]));
    }
  }
  partials.fill(few.count);
  const Vec sum = fold_lanes(partials, few.count, [](Vec a, Vec b) { return a + b; });
  const Vec old_sum = load_lanes(s.sum + few.first, few.count);
  store_lanes(s.sum + few.first, old_sum * load(few.scale) + sum, few.count);
}

// A few rows' largest scores are found before the weights of those before them, so that nothing
// waits for them.
template <bool kPairs, bool kScaled>
__attribute__((noinline)) void soften(const SoftenRows& all) {
  const SoftenRows s = all;  // which no store changes
  const bool simple = s.softcap == 0.0f && !s.slopes;
  FewRows few[2];
  for (int64_t first = 0, i = 0; first < s.num_rows + kLanes; first += kLanes, i ^= 1) {
    FewRows &next = few[i], &now = few[i ^ 1];
    if (first < s.num_rows) {
      next.first = first;
      next.count = s.num_rows - first < kLanes ? s.num_rows - first : kLanes;
      const int64_t token = first / s.group, left = s.group - first % s.group;
      simple ? find_largest<true>(s, token, left, next) : find_largest<false>(s, token, left, next);
    }
    if (first == 0) continue;
    now.any_finished ? weigh_few<kPairs, kScaled, true>(s, now)
                     : weigh_few<kPairs, kScaled, false>(s, now);
  }
}

}  // namespace soften

inline void soften_rows(const SoftenRows& s) {
#if defined(__AVX512F__)
  if (s.weights == Weights::kPairs) {
    return s.value_factors ? soften::soften<true, true>(s) : soften::soften<true, false>(s);
  }
#endif
  s.value_factors ? soften::soften<false, true>(s) : soften::soften<false, false>(s);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
