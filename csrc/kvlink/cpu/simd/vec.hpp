// Vectors of the level being compiled: kLanes floats, in gcc/clang vector extensions. Included by
// *_simd.cpp only; everything lives in the level's namespace, so that no linker mixes two levels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // gcc 12 sees its own intrinsics' undefined vectors
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#ifndef KVLINK_SIMD_LEVEL
#error "a source named *_simd.cpp includes this; setup.py compiles it once per level"
#endif

#define KVLINK_INLINE inline __attribute__((always_inline))
// Before loops over arrays of vectors, which must become registers.
#define KVLINK_UNROLL _Pragma("GCC unroll 32")
#define KVLINK_PRAGMA(text) _Pragma(#text)
#define KVLINK_UNROLL_BY(times) KVLINK_PRAGMA(GCC unroll times)

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));

template <typename V>
KVLINK_INLINE V load_unaligned(const void* source) {
  V value;
  __builtin_memcpy(&value, source, sizeof(V));
  return value;
}
template <typename V>
KVLINK_INLINE void store_unaligned(void* target, V value) {
  __builtin_memcpy(target, &value, sizeof(V));
}
KVLINK_INLINE Vec load(const float* source) { return load_unaligned<Vec>(source); }
KVLINK_INLINE void store(float* target, Vec value) { store_unaligned(target, value); }
KVLINK_INLINE Vec splat(float value) { return value - Vec{}; }
KVLINK_INLINE VecI splat(int32_t value) { return value - VecI{}; }

KVLINK_INLINE VecU bits_of(Vec value) { return (VecU)value; }
KVLINK_INLINE Vec from_bits(VecU bits) { return (Vec)bits; }
KVLINK_INLINE Vec select(VecI condition, Vec yes, Vec no) { return condition ? yes : no; }
KVLINK_INLINE VecU select(VecI condition, VecU yes, VecU no) { return condition ? yes : no; }
// The second argument where either is NaN.
KVLINK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

KVLINK_INLINE VecI lane_indices() {
  VecI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// v with lanes i and i ^ kDistance exchanged.
template <int kDistance>
KVLINK_INLINE Vec exchange_lanes(Vec v) {
  constexpr int d = kDistance;
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d,
                                 8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d);
#else
  return __builtin_shufflevector(v, v, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d);
#endif
}

KVLINK_INLINE float sum_lanes(Vec v) {
  if constexpr (kLanes > 8) v += exchange_lanes<kLanes / 2>(v);
  if constexpr (kLanes > 4) v += exchange_lanes<4>(v);
  v += exchange_lanes<2>(v);
  v += exchange_lanes<1>(v);
  return v[0];
}

KVLINK_INLINE float max_lanes(Vec v) {
  if constexpr (kLanes > 8) v = max(v, exchange_lanes<kLanes / 2>(v));
  if constexpr (kLanes > 4) v = max(v, exchange_lanes<4>(v));
  v = max(v, exchange_lanes<2>(v));
  v = max(v, exchange_lanes<1>(v));
  return v[0];
}

// The same shuffle of four lanes in every 128-bit part; indices from kLanes on name lanes of b.
#if defined(__AVX512F__)
#define KVLINK_SHUFFLE(a, b, i0, i1, i2, i3)                                                      \
  __builtin_shufflevector(a, b, i0, i1, i2, i3, (i0) + 4, (i1) + 4, (i2) + 4, (i3) + 4, (i0) + 8, \
                          (i1) + 8, (i2) + 8, (i3) + 8, (i0) + 12, (i1) + 12, (i2) + 12,          \
                          (i3) + 12)
#elif defined(__AVX2__)
#define KVLINK_SHUFFLE(a, b, i0, i1, i2, i3) \
  __builtin_shufflevector(a, b, i0, i1, i2, i3, (i0) + 4, (i1) + 4, (i2) + 4, (i3) + 4)
#else
#define KVLINK_SHUFFLE(a, b, i0, i1, i2, i3) __builtin_shufflevector(a, b, i0, i1, i2, i3)
#endif

// Lane i: the sum of the lanes of v[i]. Lanes of every vector are added by halves: those kLanes / 2
// apart first, neighbours last (see product_block, which adds in the same order).
KVLINK_INLINE Vec sums_of(const Vec (&v)[kLanes]) {
  Vec part[kLanes];  // in the order in which lanes of the result come together
  KVLINK_UNROLL
  for (int i = 0; i < kLanes; ++i) part[i % 4 * (kLanes / 4) + i / 4] = v[i];
#if defined(__AVX512F__)
  KVLINK_UNROLL
  for (int i = 0; i < 8; ++i) {
    const Vec a = part[2 * i], b = part[2 * i + 1];
    part[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  KVLINK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vec a = part[2 * i], b = part[2 * i + 1];
    part[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#elif defined(__AVX2__)
  KVLINK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vec a = part[2 * i], b = part[2 * i + 1];
    part[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#endif
  constexpr int b = kLanes;
  KVLINK_UNROLL
  for (int i = 0; i < 2; ++i) {
    part[i] = KVLINK_SHUFFLE(part[2 * i], part[2 * i + 1], 0, 1, b, b + 1) +
              KVLINK_SHUFFLE(part[2 * i], part[2 * i + 1], 2, 3, b + 2, b + 3);
  }
  return KVLINK_SHUFFLE(part[0], part[1], 0, 2, b, b + 2) +
         KVLINK_SHUFFLE(part[0], part[1], 1, 3, b + 1, b + 3);
}

#if defined(__AVX512F__)
// Transposes a 4 x 4 block of 128-bit parts.
KVLINK_INLINE void transpose_parts(Vec (&rows)[4]) {
  Vec half[4];
  KVLINK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto a = (__m512)rows[i / 2 * 2], b = (__m512)rows[i / 2 * 2 + 1];
    half[i] = i % 2 ? (Vec)_mm512_shuffle_f32x4(a, b, 0xee) : (Vec)_mm512_shuffle_f32x4(a, b, 0x44);
  }
  KVLINK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto a = (__m512)half[i / 2], b = (__m512)half[i / 2 + 2];
    rows[i] = i % 2 ? (Vec)_mm512_shuffle_f32x4(a, b, 0xdd) : (Vec)_mm512_shuffle_f32x4(a, b, 0x88);
  }
}
#endif

// Transposes a kLanes x kLanes block held in registers.
KVLINK_INLINE void transpose(Vec (&rows)[kLanes]) {
  constexpr int b = kLanes;
  KVLINK_UNROLL
  for (int i = 0; i < kLanes; i += 4) {  // 4 x 4 blocks in place
    const Vec t0 = KVLINK_SHUFFLE(rows[i], rows[i + 1], 0, b, 1, b + 1);
    const Vec t1 = KVLINK_SHUFFLE(rows[i], rows[i + 1], 2, b + 2, 3, b + 3);
    const Vec t2 = KVLINK_SHUFFLE(rows[i + 2], rows[i + 3], 0, b, 1, b + 1);
    const Vec t3 = KVLINK_SHUFFLE(rows[i + 2], rows[i + 3], 2, b + 2, 3, b + 3);
    rows[i] = KVLINK_SHUFFLE(t0, t2, 0, 1, b, b + 1);
    rows[i + 1] = KVLINK_SHUFFLE(t0, t2, 2, 3, b + 2, b + 3);
    rows[i + 2] = KVLINK_SHUFFLE(t1, t3, 0, 1, b, b + 1);
    rows[i + 3] = KVLINK_SHUFFLE(t1, t3, 2, 3, b + 2, b + 3);
  }
#if defined(__AVX512F__)
  for (int i = 0; i < 4;
       ++i) {  // then the blocks change places, four rows that share a column each
    const Vec t0 = __builtin_shufflevector(rows[i], rows[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9,
                                           10, 11, 24, 25, 26, 27);
    const Vec t1 = __builtin_shufflevector(rows[i], rows[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13,
                                           14, 15, 28, 29, 30, 31);
    const Vec t2 = __builtin_shufflevector(rows[i + 8], rows[i + 12], 0, 1, 2, 3, 16, 17, 18, 19, 8,
                                           9, 10, 11, 24, 25, 26, 27);
    const Vec t3 = __builtin_shufflevector(rows[i + 8], rows[i + 12], 4, 5, 6, 7, 20, 21, 22, 23,
                                           12, 13, 14, 15, 28, 29, 30, 31);
    rows[i] =
        __builtin_shufflevector(t0, t2, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    rows[i + 4] =
        __builtin_shufflevector(t1, t3, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    rows[i + 8] = __builtin_shufflevector(t0, t2, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                          29, 30, 31);
    rows[i + 12] = __builtin_shufflevector(t1, t3, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                           29, 30, 31);
  }
#elif defined(__AVX2__)
  KVLINK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vec low = __builtin_shufflevector(rows[i], rows[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    rows[i] = low;
  }
#endif
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
