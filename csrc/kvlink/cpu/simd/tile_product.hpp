// Products of a few rows with a panel, C = scale * C + A B. Each element of C is computed in an
// order that depends on its depth alone, wherever it lies in its tile: that is what makes attention
// independent of how rows are batched. Scores are summed in kChains chains, term i by chain
// i % kChains, that are added at the end (see page_rows.hpp, which does the same): those half as
// many as there are apart first, neighbours last.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// A term is one product of floats.
struct FloatTerms {
  typedef float Left;
  static KVLINK_INLINE Vec spread(Left left) { return splat(left); }
  static KVLINK_INLINE void add(Vec& sum, Vec left, Vec right) { sum += right * left; }
};

// A term is the sum of two products of bfloat16, side by side in 32 bits, with what was there.
struct PairTerms {
  typedef uint32_t Left;
  static KVLINK_INLINE Vec spread(Left left) { return from_bits(VecU{} + left); }
  static KVLINK_INLINE void add(Vec& sum, Vec left, Vec right) {
#if defined(__AVX512F__)
    // NOTE: as text, so that the level need not be compiled for CPUs that have it.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(right), "v"(left));
#else
    (void)sum, (void)left, (void)right;  // no instance of these levels uses it
#endif
  }
};

template <class Terms>
struct TileProduct {
  const typename Terms::Left* a;  // [num_rows, depth], rows stride_a apart
  const float* b;                 // [depth, num_vecs * kLanes], rows stride_b apart
  float* c;                       // [num_rows, num_vecs * kLanes], rows stride_c apart
  const float* row_scale;         // [num_rows] factors of the old C; null: C is overwritten
  int64_t stride_a, stride_b, stride_c;
  int64_t num_rows, depth, num_vecs;
};

// Adds terms `first`, first + kStep, ...
template <class Terms, int kStep, int kRows, int kVecs>
KVLINK_INLINE void add_terms(const TileProduct<Terms>& t, int64_t first, int64_t row, int64_t vec,
                             Vec (&sum)[kRows][kVecs]) {
  const auto* a = t.a + row * t.stride_a;
  const float* b = t.b + vec * kLanes + first * t.stride_b;
  for (int64_t d = first; d < t.depth; d += kStep, b += kStep * t.stride_b) {
    Vec right[kVecs];
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + v * kLanes);
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec left = Terms::spread(a[r * t.stride_a + d]);
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) Terms::add(sum[r][v], left, right[v]);
    }
  }
}

// Where in the order of additions chain i comes: its bits from the last to the first.
constexpr int chain_at(int i, int num_chains) {
  int chain = 0;
  for (int bit = 1; bit < num_chains; bit *= 2, i /= 2) chain = chain * 2 + i % 2;
  return chain;
}

template <class Terms, int kChains, int kRows, int kVecs>
KVLINK_INLINE void product_block(const TileProduct<Terms>& t, int64_t row, int64_t vec) {
  constexpr int kLevels = __builtin_ctz(kChains);
  float* c = t.c + row * t.stride_c + vec * kLanes;
  Vec waiting[kLevels + 1][kRows][kVecs];  // sums of as many chains that those after them will join
  for (int i = 0; i < kChains; ++i) {
    Vec sum[kRows][kVecs];
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        sum[r][v] = kChains == 1 && t.row_scale
                        ? load(c + r * t.stride_c + v * kLanes) * t.row_scale[row + r]
                        : Vec{};
      }
    }
    add_terms<Terms, kChains>(t, chain_at(i, kChains), row, vec, sum);
    int level = 0;
    for (; i >> level & 1; ++level) {
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        KVLINK_UNROLL
        for (int v = 0; v < kVecs; ++v) sum[r][v] += waiting[level][r][v];
      }
    }
    const bool last = i + 1 == kChains;
    float* target = last ? c : reinterpret_cast<float*>(waiting[level]);
    const int64_t stride = last ? t.stride_c : kVecs * kLanes;
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) store(target + r * stride + v * kLanes, sum[r][v]);
    }
  }
}

template <class Terms, int kChains, int kRows, int kVecs>
KVLINK_INLINE int64_t product_rows(const TileProduct<Terms>& t, int64_t row, int64_t vec) {
  for (; row + kRows <= t.num_rows; row += kRows) {
    product_block<Terms, kChains, kRows, kVecs>(t, row, vec);
  }
  return row;
}

// One panel of kVecs vectors, which stays in the nearest cache while the rows pass.
template <class Terms, int kChains, int kVecs>
__attribute__((noinline)) void product_panel(const TileProduct<Terms>& t, int64_t vec) {
#if defined(__AVX512F__)
  constexpr int kRows = kVecs <= 4 ? 6 : 3;
#else
  constexpr int kRows = kVecs <= 2 ? 4 : kVecs <= 4 ? 2 : 1;
#endif
  int64_t row = product_rows<Terms, kChains, kRows, kVecs>(t, 0, vec);
  if constexpr (kRows > 4) row = product_rows<Terms, kChains, 4, kVecs>(t, row, vec);
  if constexpr (kRows > 2) row = product_rows<Terms, kChains, 2, kVecs>(t, row, vec);
  product_rows<Terms, kChains, 1, kVecs>(t, row, vec);
}

template <int kChains = 1, class Terms = FloatTerms>
__attribute__((noinline)) void tile_product(const TileProduct<Terms>& t) {
#if defined(__AVX512F__)
  constexpr int kWide = 4;
#else
  constexpr int kWide = 2;
#endif
  int64_t vec = 0;
  if (t.num_rows <= 2) {  // few rows: more vectors, so that additions do not wait for each other
    for (; vec + 8 <= t.num_vecs; vec += 8) product_panel<Terms, kChains, 8>(t, vec);
  }
  for (; vec + kWide <= t.num_vecs; vec += kWide) product_panel<Terms, kChains, kWide>(t, vec);
  for (; vec + 2 <= t.num_vecs; vec += 2) product_panel<Terms, kChains, 2>(t, vec);
  for (; vec < t.num_vecs; ++vec) product_panel<Terms, kChains, 1>(t, vec);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
