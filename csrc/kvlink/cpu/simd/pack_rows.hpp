// Rows of a block of positions widened into panels that many query rows are multiplied with. Their
// rows are as contiguous as the layout stores them, a pointer each. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/pair_rows.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

inline constexpr int64_t kPanelRows = 64;
using PanelRows = const char* [kPanelRows];

alignas(64) inline constexpr char kNothing[4096] = {};  // a row that is not read, of any type

// Asks for a row that will be wanted later.
KVLINK_INLINE void prefetch_row(const char* row, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// What a panel of keys holds of a stored type: floats, or pairs.
template <DType kDType>
struct FloatItems {
  static constexpr int64_t kBytes = Row<kDType>::kBytes;
  static KVLINK_INLINE Vec load(const char* source) { return Row<kDType>::load(source); }
  static KVLINK_INLINE Vec load_some(const char* source, int64_t count) {
    return KVLINK_SIMD_LEVEL::load_some<kDType>(source, count);
  }
};
#if defined(__AVX512F__)
template <DType kDType>
struct PairItems {
  static constexpr int64_t kBytes = 2 * Pairs<kDType>::kElementBytes;
  static KVLINK_INLINE Vec load(const char* source) {
    return Pairs<kDType>::neighbours(load_bytes<kLanes * kBytes>(source));
  }
  static KVLINK_INLINE Vec load_some(const char* source, int64_t num_items) {
    return Pairs<kDType>::neighbours(load_some_bytes(source, num_items * kBytes));
  }
};
#endif

// Transposed: keys[item * kPanelRows + position], zeros from num_items to a multiple of kLanes.
template <class Items>
void pack_keys(const PanelRows& rows, int64_t num_items, float* keys) {
  for (int64_t first = 0; first < kPanelRows; first += kLanes) {
    const char* const* source = rows + first;
    Vec block[kLanes];
    int64_t item = 0;
    for (; item + kLanes <= num_items; item += kLanes) {
      KVLINK_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = Items::load(source[i] + item * Items::kBytes);
      transpose(block);
      float* target = keys + item * kPanelRows + first;
      KVLINK_UNROLL
      for (int i = 0; i < kLanes; ++i) store(target + i * kPanelRows, block[i]);
    }
    if (item == num_items) continue;
    KVLINK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      block[i] = Items::load_some(source[i] + item * Items::kBytes, num_items - item);
    }
    transpose(block);
    KVLINK_UNROLL
    for (int i = 0; i < kLanes; ++i) store(keys + (item + i) * kPanelRows + first, block[i]);
  }
}

// values[position * stride + dim], zeros from dims to stride.
template <DType kDType>
void pack_values(const PanelRows& rows, int64_t dims, int64_t stride, float* values) {
  for (int64_t position = 0; position < kPanelRows; ++position, values += stride) {
    const char* row = rows[position];
    int64_t dim = 0;
    for (; dim + kLanes <= dims; dim += kLanes) {
      store(values + dim, Row<kDType>::load(row + dim * Row<kDType>::kBytes));
    }
    for (; dim < stride; dim += kLanes) {
      const int64_t count = dim < dims ? dims - dim : 0;
      store(values + dim, load_some<kDType>(row + dim * Row<kDType>::kBytes, count));
    }
  }
}

#if defined(__AVX512F__)
// Pairs of positions: values[position / 2 * stride + dim].
template <DType kDType>
void pack_value_pairs(const PanelRows& rows, int64_t dims, int64_t stride, float* values) {
  constexpr int64_t kBytes = Pairs<kDType>::kElementBytes;
  for (int64_t position = 0; position < kPanelRows; position += 2, values += stride) {
    const char *first = rows[position], *second = rows[position + 1];
    int64_t dim = 0;
    for (; dim + 2 * kLanes <= dims; dim += 2 * kLanes) {
      Vec pairs[2];
      Pairs<kDType>::side_by_side(first + dim * kBytes, second + dim * kBytes, pairs);
      store(values + dim, pairs[0]);
      store(values + dim + kLanes, pairs[1]);
    }
    for (; dim < stride; dim += kLanes) {
      const int64_t left = dim < dims ? dims - dim : 0;
      Vec pairs[1];
      Pairs<kDType>::some_side_by_side(first + dim * kBytes, second + dim * kBytes,
                                       left < kLanes ? left : kLanes, pairs);
      store(values + dim, pairs[0]);
    }
  }
}

// One row of such pairs in which only one of the two positions is left.
inline void keep_one_of_pairs(const float* values, bool second, int64_t stride, float* kept) {
  const uint32_t mask = second ? 0xffff0000u : 0xffffu;
  for (int64_t dim = 0; dim < stride; dim += kLanes) {
    store(kept + dim, from_bits(bits_of(load(values + dim)) & mask));
  }
}
#endif

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
