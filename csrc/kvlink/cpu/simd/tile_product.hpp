// C = A B or C = scale C + A B for small row-major float tiles, B's rows padded to whole vectors.
//
// NOTE: every element of C sees the same operations in the same order whatever the number of rows
// and wherever it lies in its tile. That is what makes attention independent of how rows are
// batched.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

struct TileProduct {
  const float* a;          // [num_rows, depth], rows stride_a apart
  const float* b;          // [depth, num_vecs * kLanes], rows stride_b apart
  float* c;                // [num_rows, num_vecs * kLanes], rows stride_c apart
  const float* row_scale;  // [num_rows] factors of the old C; null: C is overwritten
  int64_t stride_a, stride_b, stride_c;
  int64_t num_rows, depth, num_vecs;
};

template <int kRows, int kVecs>
KVLINK_INLINE void product_block(const TileProduct& t, int64_t row, int64_t vec) {
  Vec sum[kRows][kVecs];
  float* c = t.c + row * t.stride_c + vec * kLanes;
  const float* a = t.a + row * t.stride_a;
  const float* b = t.b + vec * kLanes;
  KVLINK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] =
          t.row_scale ? load(c + r * t.stride_c + v * kLanes) * t.row_scale[row + r] : Vec{};
    }
  }
  for (int64_t d = 0; d < t.depth; ++d, b += t.stride_b) {
    Vec right[kVecs];
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + v * kLanes);
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * t.stride_a + d];
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] += right[v] * left;
    }
  }
  KVLINK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) store(c + r * t.stride_c + v * kLanes, sum[r][v]);
  }
}

template <int kRows, int kVecs>
KVLINK_INLINE int64_t product_rows(const TileProduct& t, int64_t row, int64_t vec) {
  for (; row + kRows <= t.num_rows; row += kRows) product_block<kRows, kVecs>(t, row, vec);
  return row;
}

// One panel of kVecs vectors, which stays in the nearest cache while the rows pass.
template <int kVecs>
__attribute__((noinline)) void product_panel(const TileProduct& t, int64_t vec) {
#if defined(__AVX512F__)
  constexpr int kRows = kVecs <= 4 ? 6 : 3;
#else
  constexpr int kRows = kVecs <= 2 ? 4 : kVecs <= 4 ? 2 : 1;
#endif
  int64_t row = product_rows<kRows, kVecs>(t, 0, vec);
  if constexpr (kRows > 4) row = product_rows<4, kVecs>(t, row, vec);
  if constexpr (kRows > 2) row = product_rows<2, kVecs>(t, row, vec);
  product_rows<1, kVecs>(t, row, vec);
}

inline __attribute__((noinline)) void tile_product(const TileProduct& t) {
#if defined(__AVX512F__)
  constexpr int kWide = 4;
#else
  constexpr int kWide = 2;
#endif
  int64_t vec = 0;
  if (t.num_rows <= 2) {  // few rows: more vectors, so that additions do not wait for each other
    for (; vec + 8 <= t.num_vecs; vec += 8) product_panel<8>(t, vec);
  }
  for (; vec + kWide <= t.num_vecs; vec += kWide) product_panel<kWide>(t, vec);
  for (; vec + 2 <= t.num_vecs; vec += 2) product_panel<2>(t, vec);
  for (; vec < t.num_vecs; ++vec) product_panel<1>(t, vec);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
