// Vectors of floats as one stripe of 64 stored bytes: the vector form of base/convert.hpp's
// conversions from float32. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/words.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

KVLINK_INLINE VecU min_bits(VecU bits, uint32_t bound) {
  return select((VecI)bits < (VecI)(VecU{} + bound), bits, VecU{} + bound);
}

// Codes lie in the low byte of each lane; so do those below.
KVLINK_INLINE VecU narrow_to_float8_e4m3(Vec value) {
  const VecU bits = bits_of(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU bounded = min_bits(magnitude, 0x43e00000u);  // 448
  const VecU normal = (bounded + (0x7ffffu - 0x3c000000u) + ((bounded >> 20) & 1u)) >> 20;
  const VecU small = bits_of(from_bits(bounded) + splat(16384.0f)) - 0x46800000u;
  const VecU finite = select((VecI)magnitude < 0x3c800000, small, normal);
  const VecU nan_bit = (VecU)((VecI)magnitude > 0x7f800000) & 1u;  // 0x7e is 448, 0x7f NaN
  return ((bits >> 24) & 0x80u) | finite | nan_bit;
}

KVLINK_INLINE VecU narrow_to_float8_e5m2(Vec value) {
  const VecU bits = bits_of(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU bounded = min_bits(magnitude, 0x47600000u);  // 57344
  const VecU normal = (bounded + (0xfffffu - 0x38000000u) + ((bounded >> 21) & 1u)) >> 21;
  const VecU small = bits_of(from_bits(bounded) + splat(128.0f)) - 0x43000000u;
  const VecU finite = select((VecI)magnitude < 0x38800000, small, normal);
  const VecU nan_bits = (VecU)((VecI)magnitude > 0x7f800000) & 0x7fu;
  return ((bits >> 24) & 0x80u) | finite | nan_bits;
}

KVLINK_INLINE VecU narrow_to_int8(Vec value) {
#if defined(__AVX512F__)
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_ORD_Q);
  const __m512 bounded =
      _mm512_min_ps(_mm512_max_ps((__m512)value, _mm512_set1_ps(-127.0f)), _mm512_set1_ps(127.0f));
  return (VecU)_mm512_maskz_cvtps_epi32(number, bounded) & 0xffu;
#else
  const VecU bits = bits_of(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU bounded = min_bits(magnitude, 0x42fe0000u);  // 127
  const VecU number = (VecU)((VecI)magnitude <= 0x7f800000);
  const VecU finite = (bounded | (bits & 0x80000000u)) & number;
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  return bits_of(from_bits(finite) + splat(12582912.0f)) & 0xffu;
#endif
}

// The low 16 bits of every lane, in order.
KVLINK_INLINE Words pack_halves(const VecU (&codes)[32 / kLanes]) {
#if defined(__AVX512F__)
  const __m512i mixed = _mm512_packus_epi32((__m512i)codes[0], (__m512i)codes[1]);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return {{(WordPart)_mm512_permutexvar_epi64(order, mixed)}};
#elif defined(__AVX2__)
  Words words;
  KVLINK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256i mixed = _mm256_packus_epi32((__m256i)codes[2 * i], (__m256i)codes[2 * i + 1]);
    words.part[i] = (WordPart)_mm256_permute4x64_epi64(mixed, 0xd8);
  }
  return words;
#else
  uint16_t stored[32];
  for (int i = 0; i < 32; ++i) stored[i] = static_cast<uint16_t>(codes[i / kLanes][i % kLanes]);
  return Words::load(stored);
#endif
}

// The low 8 bits of every lane, in order; the others are 0.
KVLINK_INLINE Words pack_bytes(const VecU (&codes)[64 / kLanes]) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_packus_epi32((__m512i)codes[0], (__m512i)codes[1]);
  const __m512i high = _mm512_packus_epi32((__m512i)codes[2], (__m512i)codes[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i mixed = _mm512_packus_epi16(low, high);
  return {{(WordPart)_mm512_permutexvar_epi32(order, mixed)}};
#elif defined(__AVX2__)
  Words words;
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  KVLINK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const VecU* part = codes + 4 * i;
    const __m256i low = _mm256_packus_epi32((__m256i)part[0], (__m256i)part[1]);
    const __m256i high = _mm256_packus_epi32((__m256i)part[2], (__m256i)part[3]);
    words.part[i] = (WordPart)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  }
  return words;
#else
  uint8_t stored[64];
  for (int i = 0; i < 64; ++i) stored[i] = static_cast<uint8_t>(codes[i / kLanes][i % kLanes]);
  return Words::load(stored);
#endif
}

template <DType kDType>
KVLINK_INLINE VecU narrow_lanes(Vec value) {
  if constexpr (kDType == DType::kFloat8E4M3) return narrow_to_float8_e4m3(value);
  if constexpr (kDType == DType::kFloat8E5M2) return narrow_to_float8_e5m2(value);
  if constexpr (kDType == DType::kInt8) return narrow_to_int8(value);
  if constexpr (kDType == DType::kFloat16) return narrow_to_float16(value);
  return narrow_to_bfloat16(value);
}

template <DType kDType>
KVLINK_INLINE Words narrow(const Vec (&values)[64 / Row<kDType>::kBytes / kLanes]) {
  constexpr int kVecs = 64 / Row<kDType>::kBytes / kLanes;
  if constexpr (kDType == DType::kFloat32) {
    Words words;
    KVLINK_UNROLL
    for (int i = 0; i < kVecs; ++i) words.part[i] = (WordPart)values[i];
    return words;
  } else {
    VecU codes[kVecs];
    KVLINK_UNROLL
    for (int i = 0; i < kVecs; ++i) codes[i] = narrow_lanes<kDType>(values[i]);
    if constexpr (Row<kDType>::kBytes == 1) {
      return pack_bytes(codes);
    } else {
      return pack_halves(codes);
    }
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
