// Products of a few rows with a panel, C = scale * C + A B. Each element of C is computed in an
// order that depends on its depth alone, wherever it lies in its tile: that is what makes attention
// independent of how rows are batched. Scores are summed in kChains chains, term i by chain
// i % kChains, that are added at the end (see page_rows.hpp, which does the same): those half as
// many as there are apart first, neighbours last. Where chains go side by side (chains_together),
// the depth is a multiple of kChains.
#pragma once

#include <type_traits>

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

// C = row_scale * C + A B, or A B, of terms of any type.
struct TileProduct {
  const float* a;          // [num_rows, depth] of Left of the terms, rows stride_a apart
  const float* b;          // [depth, num_vecs * kLanes], rows stride_b apart
  float* c;                // [num_rows, num_vecs * kLanes], rows stride_c apart
  const float* row_scale;  // [num_rows] factors of the old C; null: C is overwritten
  int64_t stride_a, stride_b, stride_c;
  int64_t num_rows, depth, num_vecs;
};

// Adds terms `first`, first + kStep, ... to sum[0], those kApart later to sum[1], and so on.
template <class Terms, int kStep, int kApart, int kTogether, int kRows, int kVecs>
KVLINK_INLINE void add_terms(const TileProduct& t, int64_t first, int64_t row, int64_t vec,
                             Vec (&sum)[kTogether][kRows][kVecs]) {
  const auto* a = reinterpret_cast<const typename Terms::Left*>(t.a) + row * t.stride_a + first;
  const float* b = t.b + vec * kLanes + first * t.stride_b;
  const auto add = [&](int64_t ahead, auto& sums) __attribute__((always_inline)) {
    Vec right[kVecs];
    KVLINK_UNROLL
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + ahead * t.stride_b + v * kLanes);
    KVLINK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec left = Terms::spread(a[r * t.stride_a + ahead]);
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) Terms::add(sums[r][v], left, right[v]);
    }
  };
  for (int64_t d = first; d < t.depth; d += kStep, a += kStep, b += kStep * t.stride_b) {
    KVLINK_UNROLL
    for (int k = 0; k < kTogether; ++k) add(k * kApart, sum[k]);
  }
}

// Where in the order of additions chain i comes: its bits from the last to the first.
constexpr int chain_at(int i, int num_chains) {
  int chain = 0;
  for (int bit = 1; bit < num_chains; bit *= 2, i /= 2) chain = chain * 2 + i % 2;
  return chain;
}

// How many chains are summed side by side, in half as many rows: their sums are added to each other
// in registers, so half as many wait in memory. Panels of floats are too long for it: their vectors
// are loaded for each chain.
template <class Terms, int kChains>
constexpr int chains_together() {
  return kLanes == 16 && kChains > 1 && std::is_same_v<Terms, PairTerms> ? 2 : 1;
}

template <class Terms, int kChains, int kRows, int kVecs>
KVLINK_INLINE void product_block(const TileProduct& t, int64_t row, int64_t vec) {
  constexpr int kTogether = chains_together<Terms, kChains>();
  constexpr int kTurns = kChains / kTogether, kLevels = __builtin_ctz(kTurns);
  float* c = t.c + row * t.stride_c + vec * kLanes;
  Vec waiting[kLevels + 1][kRows][kVecs];  // sums of as many chains that those after them will join
  for (int i = 0; i < kTurns; ++i) {
    Vec parts[kTogether][kRows][kVecs];
    KVLINK_UNROLL
    for (int k = 0; k < kTogether; ++k) {
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        KVLINK_UNROLL
        for (int v = 0; v < kVecs; ++v) {
          parts[k][r][v] = kChains == 1 && t.row_scale
                               ? load(c + r * t.stride_c + v * kLanes) * t.row_scale[row + r]
                               : Vec{};
        }
      }
    }
    add_terms<Terms, kChains, kTurns>(t, chain_at(i, kTurns), row, vec, parts);
    auto& sum = parts[0];
    KVLINK_UNROLL
    for (int r = 0; kTogether == 2 && r < kRows; ++r) {
      KVLINK_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] += parts[kTogether - 1][r][v];
    }
    int level = 0;
    for (; i >> level & 1; ++level) {
      KVLINK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        KVLINK_UNROLL
        for (int v = 0; v < kVecs; ++v) sum[r][v] += waiting[level][r][v];
      }
    }
    const bool last = i + 1 == kTurns;
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
KVLINK_INLINE int64_t product_rows(const TileProduct& t, int64_t row, int64_t vec) {
  for (; row + kRows <= t.num_rows; row += kRows) {
    product_block<Terms, kChains, kRows, kVecs>(t, row, vec);
  }
  return row;
}

// One panel of kVecs vectors, which stays in the nearest cache while the rows pass.
template <class Terms, int kChains, int kVecs>
__attribute__((noinline)) void product_panel(const TileProduct& t, int64_t vec) {
#if defined(__AVX512F__)
  constexpr int kRows = (kVecs <= 4 ? 6 : 3) / chains_together<Terms, kChains>();
#else
  constexpr int kRows = kVecs <= 2 ? 4 : kVecs <= 4 ? 2 : 1;
#endif
  int64_t row = product_rows<Terms, kChains, kRows, kVecs>(t, 0, vec);
  if constexpr (kRows > 4) row = product_rows<Terms, kChains, 4, kVecs>(t, row, vec);
  if constexpr (kRows > 2) row = product_rows<Terms, kChains, 2, kVecs>(t, row, vec);
  product_rows<Terms, kChains, 1, kVecs>(t, row, vec);
}

template <int kChains = 1, class Terms = FloatTerms>
__attribute__((noinline)) void tile_product(const TileProduct& t) {
#if defined(__AVX512F__)
  constexpr int kWide = 4;
#else
  constexpr int kWide = 2;
#endif
  int64_t vec = 0;
  if constexpr (chains_together<Terms, kChains>() == 1) {
    if (t.num_rows <= 2) {  // few rows: more vectors, so that additions do not wait for each other
      for (; vec + 8 <= t.num_vecs; vec += 8) product_panel<Terms, kChains, 8>(t, vec);
    }
  }
  for (; vec + kWide <= t.num_vecs; vec += kWide) product_panel<Terms, kChains, kWide>(t, vec);
  for (; vec + 2 <= t.num_vecs; vec += 2) product_panel<Terms, kChains, 2>(t, vec);
  for (; vec < t.num_vecs; ++vec) product_panel<Terms, kChains, 1>(t, vec);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
