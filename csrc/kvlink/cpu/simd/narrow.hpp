// Vectors of floats as one stripe of 64 stored bytes: the vector form of base/convert.hpp's
// conversions from float32, from AVX2 on. Included by *_simd.cpp only.
#pragma once

#include <type_traits>

#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/words.hpp"

#if defined(__AVX2__)

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// Bits of magnitudes, which order like integers.
KVLINK_INLINE VecU min_bits(VecU a, uint32_t bound) {
  const VecU b = VecU{} + bound;
#if defined(__AVX512F__)
  return (VecU)_mm512_min_epu32((__m512i)a, (__m512i)b);
#else
  return (VecU)_mm256_min_epu32((__m256i)a, (__m256i)b);
#endif
}

KVLINK_INLINE VecU max_bits(VecU a, uint32_t bound) {
  const VecU b = VecU{} + bound;
#if defined(__AVX512F__)
  return (VecU)_mm512_max_epu32((__m512i)a, (__m512i)b);
#else
  return (VecU)_mm256_max_epu32((__m256i)a, (__m256i)b);
#endif
}

// A float8: the bits of its mantissa, the exponent of its least normal number, its largest number.
template <int kMantissa, int kLeastExponent, uint32_t kLargestBits>
struct Float8 {
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kLeastBits = static_cast<uint32_t>(127 + kLeastExponent) << 23;
  static constexpr float kLargest = __builtin_bit_cast(float, kLargestBits);
  static constexpr float kLeastNormal = __builtin_bit_cast(float, kLeastBits);
  // Codes are so much too large where they leave round().
  static constexpr uint32_t kOffset = static_cast<uint32_t>(127 + kShift + kLeastExponent)
                                      << kMantissa;

  // Of magnitudes up to kLargest. Adding 2^kShift times the power of two that the value begins with
  // (at least kLeastNormal) leaves the rounded mantissa, its leading 1 included, in the low bits.
  static KVLINK_INLINE VecU round(VecU bounded) {
    const VecU addend = max_bits(bounded & 0x7f800000u, kLeastBits) + (uint32_t{kShift} << 23);
    const VecU sum = bits_of(from_bits(bounded) + from_bits(addend));
    return sum - addend + (sum >> kShift);
  }

  static KVLINK_INLINE VecU narrow(Vec value) {
    const VecU bits = bits_of(value);
    const VecU magnitude = bits & 0x7fffffffu;
    const VecU finite = round(min_bits(magnitude, kLargestBits)) - kOffset;
    const VecU nan_bits = (VecU)((VecI)magnitude > 0x7f800000) & 0x7fu;
    return ((bits >> 24) & 0x80u) | finite | nan_bits;
  }
};
using Float8E4M3 = Float8<3, -6, 0x43e00000u>;   // 448
using Float8E5M2 = Float8<2, -14, 0x47600000u>;  // 57344
template <DType kDType>
using Float8Of = std::conditional_t<kDType == DType::kFloat8E4M3, Float8E4M3, Float8E5M2>;

KVLINK_INLINE VecU narrow_to_int8(Vec value) {
  const VecU bits = bits_of(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU bounded = min_bits(magnitude, 0x42fe0000u);  // 127
  const VecU number = (VecU)((VecI)magnitude <= 0x7f800000);
  const VecU finite = (bounded | (bits & 0x80000000u)) & number;
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  return bits_of(from_bits(finite) + splat(12582912.0f)) & 0xffu;
}

// The low 16 bits of every lane, in order.
KVLINK_INLINE Words pack_halves(const VecU (&codes)[32 / kLanes]) {
#if defined(__AVX512F__)
  const __m512i mixed = _mm512_packus_epi32((__m512i)codes[0], (__m512i)codes[1]);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return {{(WordPart)_mm512_permutexvar_epi64(order, mixed)}};
#else
  Words words;
  KVLINK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256i mixed = _mm256_packus_epi32((__m256i)codes[2 * i], (__m256i)codes[2 * i + 1]);
    words.part[i] = (WordPart)_mm256_permute4x64_epi64(mixed, 0xd8);
  }
  return words;
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
#else
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
#endif
}

template <DType kDType>
KVLINK_INLINE VecU narrow_lanes(Vec value) {
  if constexpr (kDType == DType::kFloat8E4M3) return Float8E4M3::narrow(value);
  if constexpr (kDType == DType::kFloat8E5M2) return Float8E5M2::narrow(value);
  if constexpr (kDType == DType::kInt8) return narrow_to_int8(value);
  return narrow_to_bfloat16(value);
}

template <DType kDType>
KVLINK_INLINE Words narrow(const Vec (&values)[64 / Row<kDType>::kBytes / kLanes]) {
  constexpr int kVecs = 64 / Row<kDType>::kBytes / kLanes;
  Words words;
  if constexpr (kDType == DType::kFloat32) {
    KVLINK_UNROLL
    for (int i = 0; i < kVecs; ++i) words.part[i] = (WordPart)values[i];
    return words;
#if defined(__AVX512F__)
  } else if constexpr (kDType == DType::kFloat16) {
    const __m256i low = _mm512_cvtps_ph((__m512)values[0], _MM_FROUND_TO_NEAREST_INT);
    const __m256i high = _mm512_cvtps_ph((__m512)values[1], _MM_FROUND_TO_NEAREST_INT);
    words.part[0] = (WordPart)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return words;
#else
  } else if constexpr (kDType == DType::kFloat16) {
    KVLINK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m128i low = _mm256_cvtps_ph((__m256)values[2 * i], _MM_FROUND_TO_NEAREST_INT);
      const __m128i high = _mm256_cvtps_ph((__m256)values[2 * i + 1], _MM_FROUND_TO_NEAREST_INT);
      words.part[i] = (WordPart)_mm256_set_m128i(high, low);
    }
    return words;
#endif
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

#endif
