// Loads that widen kLanes stored elements to float, and stores that narrow them: the vector form of
// base/convert.hpp, which defines every conversion (tests hold the two together, code by code).
#pragma once

#include "kvlink/base/dtype.hpp"
#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// kLanes small integers as 32-bit ones. NOTE: __builtin_convertvector would do, but gcc 12 makes
// scalar code of it.
KVLINK_INLINE VecU widen_uint8(const char* source) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)source));
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)source));
#else
  return __builtin_convertvector(load_unaligned<VecU8>(source), VecU);
#endif
}

KVLINK_INLINE VecU widen_uint16(const char* source) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)source));
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source));
#else
  return __builtin_convertvector(load_unaligned<VecU16>(source), VecU);
#endif
}

// float16 bits in the low half of each lane.
KVLINK_INLINE Vec widen_float16(VecU half) {
  const VecU magnitude = (half & 0x7fffu) << 13;
  const VecU sign = (half & 0x8000u) << 16;
  const VecU small = bits_of(from_bits(magnitude + 0x38800000u) - splat(6.103515625e-05f));
  const VecU finite = select(magnitude < 0x00800000u, small, magnitude + 0x38000000u);
  const VecU nan_bit = (VecU)(magnitude > 0x0f800000u) & 0x400000u;
  const VecU special = (magnitude + 0x70000000u) | nan_bit;
  return from_bits(sign | select(magnitude >= 0x0f800000u, special, finite));
}

KVLINK_INLINE VecU narrow_to_float16(Vec value) {
  const VecU bits = bits_of(value);
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU bounded = select(magnitude < 0x47800000u, magnitude, VecU{} + 0x47800000u);
  const VecU normal = (bounded - 0x38000000u + 0xfffu + ((bounded >> 13) & 1u)) >> 13;
  const VecU small = bits_of(from_bits(bounded) + splat(0.5f)) - 0x3f000000u;
  const VecU finite = select(magnitude < 0x38800000u, small, normal);
  const VecU nan = ((magnitude >> 13) & 0x1ffu) | 0x7e00u;
  return ((bits >> 16) & 0x8000u) | select(magnitude > 0x7f800000u, nan, finite);
}

KVLINK_INLINE VecU narrow_to_bfloat16(Vec value) {
  const VecU bits = bits_of(value);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return select((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded);
}

// An element of a stored type in the topmost bits of each lane as a float. Below it is anything, or
// nothing.
template <DType kDType, bool kNothingBelow = false>
KVLINK_INLINE Vec from_top_bits(VecU top) {
  static_assert(dtype_bytes(kDType) <= 2);
  const VecI bits = (VecI)top;
  if constexpr (kDType == DType::kBFloat16) {
    return from_bits(kNothingBelow ? top : top & 0xffff0000u);
  } else if constexpr (kDType == DType::kInt8) {
    return __builtin_convertvector(bits >> 24, Vec);
  } else if constexpr (kDType == DType::kFloat8E4M3) {
    // NOTE: no arithmetic on subnormal floats, which would take many times as long.
    const VecI magnitude = (VecI)((top >> 4) & 0x07f00000u);
    const Vec small = __builtin_convertvector(magnitude, Vec) * 0x1p-29f;
    const Vec normal = from_bits((VecU)magnitude + 0x3c000000u);
    const Vec value = select(magnitude < 0x00800000, small, normal);
    const VecU nan = (VecU)(magnitude == 0x07f00000) & 0x7ff00000u;
    return from_bits(bits_of(value) | nan | (top & 0x80000000u));
  } else {
    constexpr bool kHalf = kDType == DType::kFloat16;
    // Exponent and mantissa go where those of a float are; the power of two mends the exponent's
    // bias, and normalises what was subnormal.
    const Vec value = from_bits((VecU)(bits >> 3) & (kHalf ? 0x8fffe000u : 0x8fe00000u)) * 0x1p112f;
    const VecI is_special = (top & 0x7c000000u) == 0x7c000000u;
    return select(is_special, from_bits(bits_of(value) | 0x7f800000u), value);
  }
}

// What a stored type is: its size, and how kLanes of them become floats.
template <DType kDType>
struct Row;

template <>
struct Row<DType::kFloat32> {
  static constexpr int kBytes = 4;
  static KVLINK_INLINE Vec load(const char* source) { return load_unaligned<Vec>(source); }
  static KVLINK_INLINE void store(char* target, Vec value) { store_unaligned(target, value); }
};

template <>
struct Row<DType::kFloat16> {
  static constexpr int kBytes = 2;
  static KVLINK_INLINE Vec load(const char* source) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source));
#else
    return widen_float16(widen_uint16(source));
#endif
  }
  static KVLINK_INLINE void store(char* target, Vec value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)target,
                        _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)target, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
    store_unaligned(target, __builtin_convertvector(narrow_to_float16(value), VecU16));
#endif
  }
};

template <>
struct Row<DType::kBFloat16> {
  static constexpr int kBytes = 2;
  static KVLINK_INLINE Vec load(const char* source) {
    return from_bits(widen_uint16(source) << 16);
  }
  static KVLINK_INLINE void store(char* target, Vec value) {
    store_unaligned(target, __builtin_convertvector(narrow_to_bfloat16(value), VecU16));
  }
};

template <>
struct Row<DType::kFloat8E4M3> {
  static constexpr int kBytes = 1;
  static KVLINK_INLINE Vec load(const char* source) {
    return from_top_bits<DType::kFloat8E4M3>(widen_uint8(source) << 24);
  }
};

template <>
struct Row<DType::kFloat8E5M2> {  // the upper half of a float16
  static constexpr int kBytes = 1;
  static KVLINK_INLINE Vec load(const char* source) {
#if defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)source));
    return (Vec)_mm512_cvtph_ps(_mm256_slli_epi16(wide, 8));
#elif defined(__F16C__)
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)source));
    return (Vec)_mm256_cvtph_ps(_mm_slli_epi16(wide, 8));
#else
    return widen_float16(widen_uint8(source) << 8);
#endif
  }
};

template <>
struct Row<DType::kInt8> {
  static constexpr int kBytes = 1;
  static KVLINK_INLINE Vec load(const char* source) {
    return from_top_bits<DType::kInt8>(widen_uint8(source) << 24);
  }
};

// The first `num_bytes` < sizeof(VecU) bytes, zeros after them; reads nothing past the last.
KVLINK_INLINE VecU load_some_bytes(const char* source, int64_t num_bytes) {
#if defined(__AVX512F__)
  return (VecU)_mm512_maskz_loadu_epi8((uint64_t{1} << num_bytes) - 1, source);
#else
  VecU padded{};
  __builtin_memcpy(&padded, source, num_bytes);
  return padded;
#endif
}

// The first `count` < kLanes elements, zeros after them; reads nothing past the last.
template <DType kDType>
KVLINK_INLINE Vec load_some(const char* source, int64_t count) {
  char padded[kLanes * Row<kDType>::kBytes] = {};
  __builtin_memcpy(padded, source, count * Row<kDType>::kBytes);
  return Row<kDType>::load(padded);
}

template <DType kDType>
KVLINK_INLINE void store_some(char* target, Vec value, int64_t count) {
  char padded[kLanes * Row<kDType>::kBytes];
  Row<kDType>::store(padded, value);
  __builtin_memcpy(target, padded, count * Row<kDType>::kBytes);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
