// Few query rows against rows of K and V where they lie in the pages: nothing is widened to memory.
//
// Scores: kLanes rows of K meet in registers. A vector of 32-bit units (one, two or four elements)
// is loaded from each, the square is transposed, and then each unit of kLanes positions is
// multiplied with the query rows, whose elements are broadcast from memory. Even and odd terms are
// summed in chains of their own, which hides the latency of an addition.
// Values: a few vectors of the output stay in registers while the rows of V pass.
#pragma once

#include "kvlink/cpu/simd/pack_rows.hpp"
#include "kvlink/cpu/simd/read_ahead.hpp"
#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// How a unit of a stored type is multiplied: kTerms terms, each of which goes with one element of a
// query row's `Terms::Left`.
template <DType kDType>
struct FloatUnits : FloatTerms {
  static constexpr int kTerms = 4 / dtype_bytes(kDType);
  template <int kTerm>
  static KVLINK_INLINE Vec right(VecU unit) {
    if constexpr (kDType == DType::kFloat32) {
      return from_bits(unit);
    } else {
      return from_top_bits<kDType, kTerm == 0>(unit << (32 - 32 / kTerms * (kTerm + 1)));
    }
  }
};
struct PairUnits : PairTerms {
  static constexpr int kTerms = 1;
  template <int kTerm>
  static KVLINK_INLINE Vec right(VecU unit) {
    return from_bits(unit);
  }
};

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
    const VecU unit = units[i];
    const auto add = [&]<int kTerm>() {
      const Vec right = Units::template right<kTerm>(unit);
      const int term = i * Units::kTerms + kTerm;
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        Units::add(sum[r][term % 2], Units::spread(q[r * stride_q + term]), right);
      }
    };
    add.template operator()<0>();
    if constexpr (Units::kTerms > 1) add.template operator()<1>();
    if constexpr (Units::kTerms > 2) add.template operator()<2>();
    if constexpr (Units::kTerms > 2) add.template operator()<3>();
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
  const char* const* values;  // [num_positions] rows of V
  int64_t offset_bytes;       // from each of them to the head
  int64_t num_positions;
  int64_t dims;
  const float* weights;  // [num_rows, num_positions], rows kPanelRows apart
  int64_t num_rows;
  const float* row_scale;  // [num_rows] factors of the old `out`; null: 1
  float* out;              // [num_rows, dims], rows stride_out apart, padded to whole vectors
  int64_t stride_out;
  ReadAhead* ahead;  // null: nothing is to be fetched
};

template <DType kDType, int kRows, int kVecs, bool kWhole>
KVLINK_INLINE void value_block(const ValueRows& s, int64_t row, int64_t dim) {
  Vec sum[kRows][kVecs];
  float* out = s.out + row * s.stride_out + dim;
  const float* weights = s.weights + row * kPanelRows;
  const int64_t offset = s.offset_bytes + dim * Row<kDType>::kBytes;
  KVLINK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = load(out + r * s.stride_out + v * kLanes);
      if (s.row_scale) sum[r][v] = sum[r][v] * s.row_scale[row + r];
    }
  }
  for (int64_t position = 0; position < s.num_positions; ++position) {
    const char* source = s.values[position] + offset;
    __asm__("" : "+r"(source));  // one address, whatever the compiler thinks of more
    if (kWhole && row == 0 && s.ahead) {
      constexpr int kBytes = kVecs * kLanes * Row<kDType>::kBytes;
      if constexpr (kBytes >= 64) {
        s.ahead->fetch<kBytes / 64>();
      } else if (position % (64 / kBytes) == 0) {
        s.ahead->fetch<1>();
      }
    }
    Vec right[kVecs];
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      right[v] = kWhole ? Row<kDType>::load(source + v * kLanes * Row<kDType>::kBytes)
                        : load_some<kDType>(source, s.dims - dim);
    }
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec left = splat(weights[r * kPanelRows + position]);
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) FloatTerms::add(sum[r][v], left, right[v]);
    }
  }
  KVLINK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) store(out + r * s.stride_out + v * kLanes, sum[r][v]);
  }
}

template <DType kDType, int kRows>
KVLINK_INLINE int64_t value_columns(const ValueRows& s, int64_t row) {
#if defined(__AVX512F__)
  constexpr int kVecs = kRows == 8 ? 2 : kRows == 4 ? 4 : 8;
#else
  constexpr int kVecs = kRows == 4 ? 2 : 4;
#endif
  for (; row + kRows <= s.num_rows; row += kRows) {
    int64_t dim = 0;
    for (; dim + kVecs * kLanes <= s.dims; dim += kVecs * kLanes) {
      value_block<kDType, kRows, kVecs, true>(s, row, dim);
    }
    for (; dim + kLanes <= s.dims; dim += kLanes) value_block<kDType, kRows, 1, true>(s, row, dim);
    if (dim < s.dims) value_block<kDType, kRows, 1, false>(s, row, dim);
  }
  return row;
}

// out = row_scale * out + weights * values.
template <DType kDType>
__attribute__((noinline)) void add_values(const ValueRows& s) {
  int64_t row = 0;
#if defined(__AVX512F__)
  row = value_columns<kDType, 8>(s, row);
#endif
  row = value_columns<kDType, 4>(s, row);
  row = value_columns<kDType, 2>(s, row);
  value_columns<kDType, 1>(s, row);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
