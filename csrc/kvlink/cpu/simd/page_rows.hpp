// Few query rows against rows of K and V where they lie in the pages: nothing is widened to memory.
//
// Scores: kLanes rows of K meet in registers. A vector of 32-bit units (one, two or four elements)
// is loaded from each, the square is transposed, and then each unit of kLanes positions is
// multiplied with the query rows, whose elements are broadcast from memory. Even and odd terms are
// summed in chains of their own, which hides the latency of an addition.
// Values: a few vectors of the output stay in registers while the rows of V pass, one by one or two
// by two.
#pragma once

#include "kvlink/cpu/simd/pack_rows.hpp"
#include "kvlink/cpu/simd/pair_rows.hpp"
#include "kvlink/cpu/simd/read_ahead.hpp"
#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// How a unit of a stored type is multiplied: kTerms terms, each of which goes with one element of a
// query row's `Terms::Left`.
template <DType kDType>
struct FloatUnits : FloatTerms {
  static constexpr int kTerms = 4 / dtype_bytes(kDType);
  static KVLINK_INLINE void widen(VecU unit, Vec (&terms)[kTerms]) {
    if constexpr (kDType == DType::kFloat32) {
      terms[0] = from_bits(unit);
    } else {
      terms[0] = from_top_bits<kDType, true>(unit << (32 - 32 / kTerms));
      KVLINK_UNROLL
      for (int i = 1; i < kTerms; ++i) {
        terms[i] = from_top_bits<kDType>(unit << (32 - 32 / kTerms * (i + 1)));
      }
    }
  }
};
#if defined(__AVX512F__)
template <DType kDType>
struct PairUnits : PairTerms, Pairs<kDType> {};
#endif

struct ScoreRows {
  const char* const* keys;  // [kLanes] rows of K
  int64_t offset_bytes;     // from each of them to the head
  int64_t num_bytes;        // of a row and head
  const void* q;            // [num_rows] of Left, padded with zeros to whole vectors of units
  int64_t stride_q;
  int64_t num_rows;
  float* sums;    // [num_rows, 2, kLanes] scratch
  float* scores;  // [num_rows, kLanes], rows kPanelRows apart
  ReadAhead* ahead;
};

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
__attribute__((noinline)) void score_rows(const ScoreRows& s) {
  for (int64_t i = 0; i < s.num_rows * 2; ++i) store(s.sums + i * kLanes, Vec{});
  const auto* q = static_cast<const typename Units::Left*>(s.q);
  constexpr int64_t kSquareBytes = sizeof(VecU);
  for (int64_t at = 0; at < s.num_bytes; at += kSquareBytes, q += kLanes * Units::kTerms) {
    const int64_t offset = s.offset_bytes + at;
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
      left >= 64 ? s.ahead->fetch<kLanes>() : s.ahead->fetch(kLanes * left / 64);
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
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const float* sums = s.sums + row * 2 * kLanes;
    store(s.scores + row * kPanelRows, load(sums) + load(sums + kLanes));
  }
}

struct ValueRows {
  const char* const* values;  // [kPanelRows] rows of V
  int64_t offset_bytes;       // from each of them to the head
  int64_t begin, end;         // positions of the block that are added
  int64_t dims;
  const float* weights;  // [num_rows, kPanelRows] floats, or pairs of two positions
  int64_t num_rows;
  const float* row_scale;  // [num_rows] factors of the old `out`; null: 1
  float* out;              // [num_rows, dims], rows stride_out apart, padded to whole vectors
  int64_t stride_out;
  ReadAhead* ahead;  // null: nothing is to be fetched

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
  for (int64_t step = s.begin / Values::kPositions; step * Values::kPositions < s.end; ++step) {
    if (kWhole && row == 0 && s.ahead) {
      constexpr int kBytes = kVecs * kLanes * Values::kElementBytes * Values::kPositions;
      if constexpr (kBytes >= 64) {
        s.ahead->fetch<kBytes / 64>();
      } else if (step % (64 / kBytes) == 0) {
        s.ahead->fetch<1>();
      }
    }
    Vec right[kVecs];
    Values::template load<kWhole>(s, step, dim, right);
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec left = Values::spread(weights[r * kPanelRows + step]);
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) Values::add(sum[r][v], left, right[v]);
    }
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
__attribute__((noinline)) void add_values(const ValueRows& s) {
  int64_t row = 0;
#if defined(__AVX512F__)
  row = value_columns<Values, 8>(s, row);
#endif
  row = value_columns<Values, 4>(s, row);
  row = value_columns<Values, 2>(s, row);
  value_columns<Values, 1>(s, row);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
