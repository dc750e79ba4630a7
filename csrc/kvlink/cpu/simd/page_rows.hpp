// Few query rows against rows of K and V where they lie in the pages: nothing is widened to memory.
//
// Scores of floats: a few rows of K times a few query rows, lane by lane; then each sum's lanes are
// added, those of kLanes sums at once. Scores of pairs: kLanes rows of K meet in registers. A
// vector of 32-bit units (one or two pairs) is loaded from each, the square is transposed, and then
// each unit of kLanes positions is multiplied with the query rows, whose elements are broadcast
// from memory. Even and odd terms are summed in chains of their own, which hides the latency of an
// addition.
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

#if defined(__AVX512F__)
// How a unit of a stored type is multiplied: kTerms terms, each of which goes with one element of a
// query row's `Terms::Left`.
template <DType kDType>
struct PairUnits : PairTerms, Pairs<kDType> {};
#endif

inline constexpr int64_t kScoredRows = 16;  // positions of a call

struct ScoreRows {
  const char* const* keys;         // [kScoredRows] rows of K
  int64_t num_bytes;               // of a row and head
  int64_t num_heads, stride_head;  // of K; bytes from one to the next in a row of K
  const float* q;    // [num_heads, num_rows] of dims or Left, padded with zeros to whole vectors
  int64_t stride_q;  // from row to row
  int64_t num_rows;  // of a head
  int64_t step;      // positions that all heads are done with before the next; 4, 8 or 16
  float* sums;       // [num_rows, 2, kLanes] scratch
  float* scores;     // [num_heads, num_rows, kScoredRows], rows kPanelRows apart
  ReadAhead* ahead;
};

// Scores of kPositions positions, from row `row` of a head on; returns the next row.
template <DType kDType, int kRows, int kPositions>
KVLINK_INLINE int64_t score_block(const ScoreRows& s, const char* const* keys, int64_t offset,
                                  const float* q, int64_t row, float* scores) {
  constexpr int64_t kBytes = Row<kDType>::kBytes;
  constexpr int64_t kVecBytes = kLanes * kBytes;
  for (; row + kRows <= s.num_rows; row += kRows) {
    if (row == 0) s.ahead->fetch(s.num_bytes * kPositions / 64);
    Vec sum[kLanes] = {};  // of row r and position p: r * kPositions + p
    const char* key[kPositions];
    KVLINK_UNROLL
    for (int p = 0; p < kPositions; ++p) key[p] = keys[p] + offset;
    const float* left = q + row * s.stride_q;
    const auto add = [&](const auto& load_key) {
      Vec right[kPositions];
      KVLINK_UNROLL
      for (int p = 0; p < kPositions; ++p) right[p] = load_key(key[p]);
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec query = load(left + r * s.stride_q);
        KVLINK_UNROLL
        for (int p = 0; p < kPositions; ++p) {
          FloatTerms::add(sum[r * kPositions + p], query, right[p]);
        }
      }
    };
    int64_t at = 0;
    for (; at + kVecBytes <= s.num_bytes; at += kVecBytes, left += kLanes) {
      add([&](const char* key) { return Row<kDType>::load(key + at); });
    }
    if (at < s.num_bytes) {
      const int64_t dims = (s.num_bytes - at) / kBytes;
      add([&](const char* key) { return load_some<kDType>(key + at, dims); });
    }
    const Vec total = sums_of(sum);
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float* target = scores + (row + r) * kPanelRows;
      __builtin_memcpy(target, reinterpret_cast<const float*>(&total) + r * kPositions,
                       kPositions * sizeof(float));
    }
  }
  return row;
}

template <DType kDType>
__attribute__((noinline)) void score_floats(const ScoreRows& s) {
  constexpr int kMost = kLanes > 4 ? kLanes / 4 : 1;  // positions of four rows
  const int64_t head_q = s.num_rows * s.stride_q, head_scores = s.num_rows * kPanelRows;
  for (int64_t group = 0; group < kScoredRows; group += s.step) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      const int64_t offset = head * s.stride_head;
      for (int64_t p = group; p < group + s.step; p += 4) {
        float* scores = s.scores + head * head_scores + p;
        const float* q = s.q + head * head_q;
        int64_t row = 0;
        for (int64_t part = 0; part < 4; part += kMost) {
          row = score_block<kDType, 4, kMost>(s, s.keys + p + part, offset, q, 0, scores + part);
        }
        constexpr int kFew = kLanes > 4 ? 4 : 2;
        const int64_t rest = row;
        for (int64_t part = 0; part < 4; part += kFew) {
          row = score_block<kDType, 2, kFew>(s, s.keys + p + part, offset, q, rest, scores + part);
          score_block<kDType, 1, kFew>(s, s.keys + p + part, offset, q, row, scores + part);
        }
      }
    }
  }
}

#if defined(__AVX512F__)
template <class Units, int kRows>
KVLINK_INLINE void add_units(const VecU* units, const typename Units::Left* q, int64_t stride_q,
                             Vec (&sum)[kRows][2]) {
  KVLINK_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    Vec terms[Units::kTerms];
    Units::widen(units[i], terms);
    KVLINK_UNROLL
    for (int t = 0; t < Units::kTerms; ++t) {
      const int term = i * Units::kTerms + t;
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        Units::add(sum[r][term % 2], Units::spread(q[r * stride_q + term]), terms[t]);
      }
    }
  }
}

// Adds one square of units to the sums of the query rows from `row` on; returns the next row.
template <class Units, int kRows>
KVLINK_INLINE int64_t add_square(const ScoreRows& s, const VecU* units,
                                 const typename Units::Left* q, int64_t row) {
  for (; row + kRows <= s.num_rows; row += kRows) {
    Vec sum[kRows][2];
    float* sums = s.sums + row * 2 * kLanes;
    KVLINK_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) sum[i / 2][i % 2] = load(sums + i * kLanes);
    add_units<Units, kRows>(units, q + row * s.stride_q, s.stride_q, sum);
    KVLINK_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) store(sums + i * kLanes, sum[i / 2][i % 2]);
  }
  return row;
}

template <class Units>
KVLINK_INLINE void score_head(const ScoreRows& s, int64_t head) {
  for (int64_t i = 0; i < s.num_rows * 2; ++i) store(s.sums + i * kLanes, Vec{});
  const auto* q =
      reinterpret_cast<const typename Units::Left*>(s.q + head * s.num_rows * s.stride_q);
  constexpr int64_t kSquareBytes = sizeof(VecU);
  for (int64_t at = 0; at < s.num_bytes; at += kSquareBytes, q += kLanes * Units::kTerms) {
    const int64_t offset = head * s.stride_head + at;
    Vec square[kLanes];
    if (at + kSquareBytes <= s.num_bytes) {
      KVLINK_UNROLL
      for (int i = 0; i < kLanes; ++i) square[i] = load_unaligned<Vec>(s.keys[i] + offset);
    } else {
      KVLINK_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        square[i] = from_bits(load_some_bytes(s.keys[i] + offset, s.num_bytes - at));
      }
    }
    if (at % 64 == 0) {
      const int64_t left = s.num_bytes - at;
      s.ahead->fetch(kLanes * (left < 64 ? left : 64) / 64);
    }
    transpose(square);
    // Through memory: registers are for the sums, however many rows there are.
    VecU units[kLanes];
    KVLINK_UNROLL
    for (int i = 0; i < kLanes; ++i) units[i] = bits_of(square[i]);
    __asm__ volatile("" : : "r"(units) : "memory");
    int64_t row = add_square<Units, 4>(s, units, q, 0);
    row = add_square<Units, 2>(s, units, q, row);
    add_square<Units, 1>(s, units, q, row);
  }
  float* scores = s.scores + head * s.num_rows * kPanelRows;
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const float* sums = s.sums + row * 2 * kLanes;
    store(scores + row * kPanelRows, load(sums) + load(sums + kLanes));
  }
}

template <class Units>
__attribute__((noinline)) void score_pairs(const ScoreRows& s) {
  static_assert(kLanes == kScoredRows);
  for (int64_t head = 0; head < s.num_heads; ++head) score_head<Units>(s, head);
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
  ReadAhead* ahead;          // null: nothing is to be fetched
  int64_t offset_bytes = 0;  // from each row of V to the head

  // Those of a row of V, zeros if the position is not added.
  KVLINK_INLINE const char* row(int64_t position) const {
    return position >= begin && position < end ? values[position] + offset_bytes : kNothing;
  }
};

// How rows of V meet weights: one at a time as floats,
template <DType kDType>
struct FloatValues : FloatTerms {
  static constexpr int kPositions = 1;
  static constexpr int kElementBytes = Row<kDType>::kBytes;
  template <bool kWhole, int kVecs>
  static KVLINK_INLINE void load(const ValueRows& s, int64_t position, int64_t dim,
                                 Vec (&right)[kVecs]) {
    const char* source = s.values[position] + s.offset_bytes + dim * kElementBytes;
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
    const char* first = s.row(step * 2) + dim * kElementBytes;
    const char* second = s.row(step * 2 + 1) + dim * kElementBytes;
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
  constexpr bool kLooksUp = Values::kPositions == 2 && Values::kElementBytes == 1;
  if constexpr (kLooksUp) {  // so much of it that more steps at once lack registers
    KVLINK_UNROLL_BY(1)
    for (; step * Values::kPositions < s.end; ++step) add(step);
  } else {
    // Unrolled, so that a load's addresses are not a large stride apart: the CPU would fetch ahead
    // in such strides.
    KVLINK_UNROLL_BY(4)
    for (; step * Values::kPositions < s.end; ++step) add(step);
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
  for (s.begin = all.begin; s.begin < all.end; s.begin = s.end) {
    s.end = (s.begin / all.step + 1) * all.step;
    if (s.end > all.end) s.end = all.end;
    for (int64_t head = 0; head < all.num_heads; ++head) {
      const int64_t first = head * all.head_rows;
      s.offset_bytes = head * all.stride_head;
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
