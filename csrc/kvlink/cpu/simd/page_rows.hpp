// Few query rows against rows of K and V where they lie in the pages: nothing is widened to memory.
//
// Scores: a few rows of K times a few query rows, lane by lane; then each sum's lanes are added,
// those of kLanes sums at once. A lane is a float, or a pair of neighbouring dims. Pairs that are
// stored as such meet queries by parts of four pairs, one of four query rows or of four rows of K
// in every part of a vector, so that four lanes of a sum are left to be added, and many query rows,
// which follow the same order, need four chains instead of kLanes.
//
// Values: a few vectors of the output stay in registers while a few rows of V pass, one by one or
// two by two.
// All KV heads are done with a few positions before the next ones: a few, because memory is fetched
// in the order of its addresses, and is to be read while it is in the nearest cache.
#pragma once

#include "kvlink/cpu/simd/pack_rows.hpp"
#include "kvlink/cpu/simd/pair_rows.hpp"
#include "kvlink/cpu/simd/read_ahead.hpp"
#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

inline constexpr int64_t kScoredRows = 16;  // positions of a call

struct ScoreRows {
  const char* const* keys;         // [kScoredRows] rows of K
  int64_t num_bytes;               // of a row and head
  int64_t num_heads, stride_head;  // of K; bytes from one to the next in a row of K
  const float* q;    // [num_heads, num_rows] of dims or pairs, padded with zeros to whole vectors;
                     // of score_parts as by store_query_parts
  int64_t stride_q;  // from row to row
  int64_t num_rows;  // of a head
  int64_t step;      // positions that all heads are done with before the next; 4, 8 or 16
  float* scores;     // [num_heads, num_rows, kScoredRows], rows kPanelRows apart
  ReadAhead* ahead;
};

// How keys of a stored type meet queries: a few bytes at a time become vectors of floats,
template <DType kDType>
struct FloatKeys : FloatTerms {
  static constexpr int kVecs = 1;
  static constexpr int64_t kBytes = kLanes * Row<kDType>::kBytes;
  static KVLINK_INLINE void load(const char* source, Vec (&keys)[kVecs]) {
    keys[0] = Row<kDType>::load(source);
  }
  // The first `num_bytes` < kBytes, zeros after them.
  static KVLINK_INLINE void load_some(const char* source, int64_t num_bytes, Vec (&keys)[kVecs]) {
    keys[0] = KVLINK_SIMD_LEVEL::load_some<kDType>(source, num_bytes / Row<kDType>::kBytes);
  }
};
#if defined(__AVX512F__)
// or of pairs.
template <DType kDType>
struct PairKeys : PairTerms {
  static constexpr int kVecs = Pairs<kDType>::kVecs;
  static constexpr int64_t kBytes = sizeof(VecU);
  static KVLINK_INLINE void load(const char* source, Vec (&keys)[kVecs]) {
    Pairs<kDType>::in_order(load_unaligned<VecU>(source), keys);
  }
  static KVLINK_INLINE void load_some(const char* source, int64_t num_bytes, Vec (&keys)[kVecs]) {
    Pairs<kDType>::in_order(load_some_bytes(source, num_bytes), keys);
  }
};
#endif

// Scores of `s.step` positions of a head, kPositions at once, from row `row` on; returns the next
// row.
template <class Keys, int kRows, int kPositions>
KVLINK_INLINE int64_t score_block(const ScoreRows& s, const char* const* keys, int64_t offset,
                                  const float* q, int64_t row, float* scores) {
  for (; row + kRows <= s.num_rows; row += kRows) {
    const float* queries = q + row * s.stride_q;
    float* target = scores + row * kPanelRows;
    for (int64_t first = 0; first < s.step; first += kPositions, target += kPositions) {
      if (row == 0) s.ahead->fetch(s.num_bytes * kPositions / 64);
      Vec sum[kLanes] = {};  // of row r and position p: r * kPositions + p
      const char* key[kPositions];
      KVLINK_UNROLL
      for (int p = 0; p < kPositions; ++p) key[p] = keys[first + p] + offset;
      const float* left = queries;
      const auto add = [&](const auto& load_key) __attribute__((always_inline)) {
        Vec right[kPositions][Keys::kVecs];
        KVLINK_UNROLL
        for (int p = 0; p < kPositions; ++p) load_key(key[p], right[p]);
        KVLINK_UNROLL
        for (int v = 0; v < Keys::kVecs; ++v) {
          KVLINK_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const Vec query = load(left + r * s.stride_q + v * kLanes);
            KVLINK_UNROLL
            for (int p = 0; p < kPositions; ++p) {
              Keys::add(sum[r * kPositions + p], query, right[p][v]);
            }
          }
        }
      };
      int64_t at = 0;
      for (; at + Keys::kBytes <= s.num_bytes; at += Keys::kBytes, left += Keys::kVecs * kLanes) {
        add([&](const char* key, auto& right)
                __attribute__((always_inline)) { Keys::load(key + at, right); });
      }
      if (at < s.num_bytes) {
        add([&](const char* key, auto& right) __attribute__((always_inline)) {
          Keys::load_some(key + at, s.num_bytes - at, right);
        });
      }
      const Vec total = sums_of(sum);
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        __builtin_memcpy(target + r * kPanelRows,
                         reinterpret_cast<const float*>(&total) + r * kPositions,
                         kPositions * sizeof(float));
      }
    }
  }
  return row;
}

template <class Keys>
__attribute__((noinline)) void score_keys(const ScoreRows& rows) {
  constexpr int kMost = kLanes > 4 ? kLanes / 4 : 1;  // positions of four rows
  constexpr int kFew = kLanes > 4 ? 4 : 2;
  const ScoreRows s = rows;  // which no store changes
  const int64_t head_q = s.num_rows * s.stride_q, head_scores = s.num_rows * kPanelRows;
  for (int64_t group = 0; group < kScoredRows; group += s.step) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      const char* const* keys = s.keys + group;
      const int64_t offset = head * s.stride_head;
      const float* q = s.q + head * head_q;
      float* scores = s.scores + head * head_scores + group;
      int64_t row = score_block<Keys, 4, kMost>(s, keys, offset, q, 0, scores);
      row = score_block<Keys, 2, kFew>(s, keys, offset, q, row, scores);
      score_block<Keys, 1, kFew>(s, keys, offset, q, row, scores);
    }
  }
}

#if defined(__AVX512F__)
inline constexpr int64_t kPartBytes = 16;
inline constexpr int kPartChains = 4;  // pairs in a part

// Row `row` of a head's queries for score_parts: those of four rows part by part, the rows after
// the last four as they are. Writes no padding.
inline void store_query_parts(const char* source, int64_t num_bytes, int64_t row, int64_t num_rows,
                              int64_t stride_q, float* q) {
  const bool in_four = row / 4 * 4 + 4 <= num_rows;
  const int64_t step = in_four ? 4 * kPartBytes : kPartBytes;
  char* target = reinterpret_cast<char*>(q + (in_four ? row / 4 * 4 : row) * stride_q);
  if (in_four) target += row % 4 * kPartBytes;
  for (int64_t at = 0; at < num_bytes; at += kPartBytes, target += step) {
    const int64_t left = num_bytes - at;
    __builtin_memcpy(target, source + at, left < kPartBytes ? left : kPartBytes);
  }
}

KVLINK_INLINE Vec repeat_part(const void* source) {
  return (Vec)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(source)));
}
// The first `num_bytes` < kPartBytes, zeros after them.
KVLINK_INLINE Vec repeat_some_part(const void* source, int64_t num_bytes) {
  return (Vec)_mm512_broadcast_i32x4(_mm_maskz_loadu_epi8((1u << num_bytes) - 1, source));
}

// Every part: the sums of that part's four lanes of v[0] to v[3], added in the order of sums_of.
KVLINK_INLINE Vec sums_of_parts(const Vec (&v)[4]) {
  constexpr int b = kLanes;
  Vec half[2];
  KVLINK_UNROLL
  for (int i = 0; i < 2; ++i) {
    half[i] = KVLINK_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 1, b, b + 1) +
              KVLINK_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 3, b + 2, b + 3);
  }
  return KVLINK_SHUFFLE(half[0], half[1], 0, 2, b, b + 2) +
         KVLINK_SHUFFLE(half[0], half[1], 1, 3, b + 1, b + 3);
}

// Four rows kFours times, from row `row` on: parts of K are repeated. Returns the next row.
template <int kFours, int kPositions>
KVLINK_INLINE int64_t score_fours(const ScoreRows& s, const char* const* keys, int64_t offset,
                                  const float* q, int64_t row, float* scores) {
  for (; row + 4 * kFours <= s.num_rows; row += 4 * kFours) {
    const float* queries = q + row * s.stride_q;
    for (int64_t first = 0; first < s.step; first += kPositions) {
      if (row == 0) s.ahead->fetch(s.num_bytes * kPositions / 64);
      Vec sum[kFours][kPositions] = {};
      const char* key[kPositions];
      KVLINK_UNROLL
      for (int p = 0; p < kPositions; ++p) key[p] = keys[first + p] + offset;
      const float* left = queries;
      const auto add = [&](const auto& load_key) __attribute__((always_inline)) {
        Vec query[kFours];
        KVLINK_UNROLL
        for (int f = 0; f < kFours; ++f) query[f] = load(left + f * 4 * s.stride_q);
        KVLINK_UNROLL
        for (int p = 0; p < kPositions; ++p) {
          const Vec right = load_key(key[p]);
          KVLINK_UNROLL
          for (int f = 0; f < kFours; ++f) PairTerms::add(sum[f][p], query[f], right);
        }
      };
      int64_t at = 0;
      KVLINK_UNROLL_BY(4)
      for (; at + kPartBytes <= s.num_bytes; at += kPartBytes, left += kLanes) {
        add([&](const char* key) __attribute__((always_inline)) { return repeat_part(key + at); });
      }
      if (at < s.num_bytes) {
        add([&](const char* key) __attribute__((always_inline)) {
          return repeat_some_part(key + at, s.num_bytes - at);
        });
      }
      KVLINK_UNROLL
      for (int i = 0; i < kFours * kPositions / 4; ++i) {
        const int f = i / (kPositions / 4), p = i % (kPositions / 4) * 4;
        const Vec total = sums_of_parts({sum[f][p], sum[f][p + 1], sum[f][p + 2], sum[f][p + 3]});
        const auto parts = (__m512)total;
        float* target = scores + (row + f * 4) * kPanelRows + first + p;
        _mm_storeu_ps(target, _mm512_castps512_ps128(parts));
        _mm_storeu_ps(target + kPanelRows, _mm512_extractf32x4_ps(parts, 1));
        _mm_storeu_ps(target + 2 * kPanelRows, _mm512_extractf32x4_ps(parts, 2));
        _mm_storeu_ps(target + 3 * kPanelRows, _mm512_extractf32x4_ps(parts, 3));
      }
    }
  }
  return row;
}

// kRows <= 2 rows, from row `row` on: parts of queries are repeated, vectors of K have the same
// part of four positions. Returns the next row.
template <int kRows, int kPositions>
KVLINK_INLINE int64_t score_few(const ScoreRows& s, const char* const* keys, int64_t offset,
                                const float* q, int64_t row, float* scores) {
  for (; row + kRows <= s.num_rows; row += kRows) {
    const float* queries = q + row * s.stride_q;
    for (int64_t first = 0; first < s.step; first += kPositions) {
      if (row == 0) s.ahead->fetch(s.num_bytes * kPositions / 64);
      constexpr int kSums = kPositions / 4;  // a row's: one of every kSums-th position, one a part
      Vec sum[4] = {};
      const char* key[kPositions];
      KVLINK_UNROLL
      for (int p = 0; p < kPositions; ++p) key[p] = keys[first + p] + offset;
      const auto add = [&](int64_t at, const auto& load_key) __attribute__((always_inline)) {
        KVLINK_UNROLL
        for (int n = 0; n < kSums; ++n) {
          Vec right[4];
          KVLINK_UNROLL
          for (int i = 0; i < 4; ++i) right[i] = load_key(key[kSums * i + n]);
          transpose_parts(right);
          KVLINK_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const char* left = reinterpret_cast<const char*>(queries + r * s.stride_q) + at;
            KVLINK_UNROLL
            for (int i = 0; i < 4; ++i) {
              PairTerms::add(sum[2 * r + n], repeat_part(left + i * kPartBytes), right[i]);
            }
          }
        }
      };
      int64_t at = 0;
      for (; at + 64 <= s.num_bytes; at += 64) {
        add(at, [&](const char* key)
                    __attribute__((always_inline)) { return load_unaligned<Vec>(key + at); });
      }
      if (at < s.num_bytes) {
        add(at, [&](const char* key) __attribute__((always_inline)) {
          return from_bits(load_some_bytes(key + at, s.num_bytes - at));
        });
      }
      // In every part: kSums of each row, those of the next two lanes on.
      const Vec sums = sums_of_parts(sum);
      Vec total;
      if constexpr (kSums == 2) {
        total = __builtin_shufflevector(sums, sums, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11,
                                        14, 15);
      } else {
        total = __builtin_shufflevector(sums, sums, 0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12, 2, 6,
                                        10, 14);
      }
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        __builtin_memcpy(scores + (row + r) * kPanelRows + first,
                         reinterpret_cast<const float*>(&total) + r * kPositions,
                         kPositions * sizeof(float));
      }
    }
  }
  return row;
}

template <int kPositions>
KVLINK_INLINE void score_head(const ScoreRows& s, const char* const* keys, int64_t offset,
                              const float* q, float* scores) {
  int64_t row = score_fours<2, kPositions>(s, keys, offset, q, 0, scores);
  row = score_fours<1, kPositions>(s, keys, offset, q, row, scores);
  row = score_few<2, kPositions>(s, keys, offset, q, row, scores);
  score_few<1, kPositions>(s, keys, offset, q, row, scores);
}

__attribute__((noinline)) inline void score_parts(const ScoreRows& rows) {
  const ScoreRows s = rows;  // which no store changes
  const int64_t head_q = s.num_rows * s.stride_q, head_scores = s.num_rows * kPanelRows;
  for (int64_t group = 0; group < kScoredRows; group += s.step) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      const char* const* keys = s.keys + group;
      const int64_t offset = head * s.stride_head;
      const float* q = s.q + head * head_q;
      float* scores = s.scores + head * head_scores + group;
      if (s.step >= 8) {
        score_head<8>(s, keys, offset, q, scores);
      } else {
        score_head<4>(s, keys, offset, q, scores);
      }
    }
  }
}
#endif

struct ValueRows {
  const char* const* values;       // [kPanelRows] rows of V
  int64_t num_heads, stride_head;  // of V; bytes from one to the next in a row of V
  int64_t begin, end;              // positions of the block that are added
  int64_t dims;
  const float* weights;    // [num_rows, kPanelRows] floats, or pairs of two positions
  int64_t num_rows;        // of a head
  int64_t head_rows;       // from a head to the next in weights, row_scale and out
  int64_t step;            // positions that all heads are done with before the next; 4, 8 or 16
  const float* row_scale;  // [num_rows] factors of the old `out`; null: 1
  float* out;              // [num_rows, dims], rows stride_out apart, padded to whole vectors
  int64_t stride_out;
  ReadAhead* ahead;  // null: nothing is to be fetched
};

// How rows of V meet weights: one at a time as floats,
template <DType kDType>
struct FloatValues : FloatTerms {
  static constexpr int kPositions = 1;
  static constexpr int kElementBytes = Row<kDType>::kBytes;
  template <bool kWhole, int kVecs>
  static KVLINK_INLINE void load(const ValueRows& s, int64_t position, int64_t dim,
                                 Vec (&right)[kVecs]) {
    const char* source = s.values[position] + dim * kElementBytes;
    __asm__("" : "+r"(source));  // one address, whatever the compiler thinks of more
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      right[v] = kWhole ? Row<kDType>::load(source + v * kLanes * kElementBytes)
                        : load_some<kDType>(source, s.dims - dim);
    }
  }
};
#if defined(__AVX512F__)
// or two as pairs.
template <DType kDType>
struct PairValues : PairTerms {
  static constexpr int kPositions = 2;
  static constexpr int kElementBytes = Pairs<kDType>::kElementBytes;
  template <bool kWhole, int kVecs>
  static KVLINK_INLINE void load(const ValueRows& s, int64_t step, int64_t dim,
                                 Vec (&right)[kVecs]) {
    const char* first = s.values[step * 2] + dim * kElementBytes;
    const char* second = s.values[step * 2 + 1] + dim * kElementBytes;
    __asm__("" : "+r"(first), "+r"(second));
    if constexpr (kWhole) {
      Pairs<kDType>::side_by_side(first, second, right);
    } else {
      Pairs<kDType>::some_side_by_side(first, second, s.dims - dim, right);
    }
  }
};
#endif

template <class Values, int kRows, int kVecs, bool kWhole>
KVLINK_INLINE void value_block(const ValueRows& s, int64_t row, int64_t dim) {
  typedef typename Values::Left Left;
  // Before anything is in registers, which a call would empty.
  if (row == 0 && s.ahead) {
    const int64_t dims = kWhole ? kVecs * kLanes : s.dims - dim;
    s.ahead->fetch((dims * Values::kElementBytes * (s.end - s.begin) + 63) / 64);
  }
  Vec sum[kRows][kVecs];
  float* out = s.out + row * s.stride_out + dim;
  const Left* weights = reinterpret_cast<const Left*>(s.weights + row * kPanelRows);
  KVLINK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = load(out + r * s.stride_out + v * kLanes);
      if (s.row_scale) sum[r][v] = sum[r][v] * s.row_scale[row + r];
    }
  }
  const auto add = [&](int64_t step) __attribute__((always_inline)) {
    Vec right[kVecs];
    Values::template load<kWhole>(s, step, dim, right);
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec left = Values::spread(weights[r * kPanelRows + step]);
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) Values::add(sum[r][v], left, right[v]);
    }
  };
  int64_t step = s.begin / Values::kPositions;
  const int64_t last = (s.end + Values::kPositions - 1) / Values::kPositions;
  constexpr bool kLooksUp = Values::kPositions == 2 && Values::kElementBytes == 1;
  // By fours, so that a load's addresses are not a large stride apart: the CPU would fetch ahead in
  // such strides. Where bytes are looked up, more steps at once lack registers.
  if constexpr (kRows > 1 && !kLooksUp) {
    // NOTE: unrolled by the compiler, these sums would go through the stack.
    for (; step + 4 <= last; step += 4) {
      KVLINK_UNROLL
      for (int i = 0; i < 4; ++i) add(step + i);
    }
  }
  if constexpr (kRows > 1 || kLooksUp) {
    KVLINK_UNROLL_BY(1)
    for (; step < last; ++step) add(step);
  } else {
    KVLINK_UNROLL_BY(4)
    for (; step < last; ++step) add(step);
  }
  KVLINK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) store(out + r * s.stride_out + v * kLanes, sum[r][v]);
  }
}

template <class Values, int kRows>
KVLINK_INLINE int64_t value_columns(const ValueRows& s, int64_t row) {
#if defined(__AVX512F__)
  constexpr int kMost = Values::kPositions == 2 && Values::kElementBytes == 1 ? 4 : 8;
  constexpr int kVecs = kRows == 8 ? 2 : kRows == 4 ? 4 : kMost;
#else
  constexpr int kVecs = kRows == 4 ? 2 : 4;
#endif
  for (; row + kRows <= s.num_rows; row += kRows) {
    int64_t dim = 0;
    for (; dim + kVecs * kLanes <= s.dims; dim += kVecs * kLanes) {
      value_block<Values, kRows, kVecs, true>(s, row, dim);
    }
    for (; dim + kLanes <= s.dims; dim += kLanes) value_block<Values, kRows, 1, true>(s, row, dim);
    if (dim < s.dims) value_block<Values, kRows, 1, false>(s, row, dim);
  }
  return row;
}

// out = row_scale * out + weights * values.
template <class Values>
__attribute__((noinline)) void add_values(const ValueRows& all) {
  ValueRows s = all;
  const char* values[kPanelRows];  // of a head; zeros beside what is added
  s.values = values;
  for (s.begin = all.begin; s.begin < all.end; s.begin = s.end) {
    s.end = (s.begin / all.step + 1) * all.step;
    if (s.end > all.end) s.end = all.end;
    for (int64_t head = 0; head < all.num_heads; ++head) {
      const int64_t first = head * all.head_rows;
      for (int64_t i = s.begin / 2 * 2; i < (s.end + 1) / 2 * 2; ++i) {
        const bool added = i >= s.begin && i < s.end;
        values[i] = added ? all.values[i] + head * all.stride_head : kNothing;
      }
      s.weights = all.weights + first * kPanelRows;
      s.row_scale = all.row_scale && s.begin == all.begin ? all.row_scale + first : nullptr;
      s.out = all.out + first * all.stride_out;
      int64_t row = 0;
#if defined(__AVX512F__)
      row = value_columns<Values, 8>(s, row);
#endif
      row = value_columns<Values, 4>(s, row);
      row = value_columns<Values, 2>(s, row);
      value_columns<Values, 1>(s, row);
    }
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
