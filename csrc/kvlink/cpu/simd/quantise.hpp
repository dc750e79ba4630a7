// bfloat16 rows quantised to a byte an element, the move that prefill and decode make most: the
// same results as narrow.hpp's in half the instructions. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/narrow.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// Whether quantise_stripe() knows the conversion, and whether it can divide by `scale`.
template <DType kSrc, DType kDst>
inline constexpr bool kQuantises =
#if defined(__AVX512F__)
    kSrc == DType::kBFloat16 && Row<kDst>::kBytes == 1;
#else
    false;
#endif
KVLINK_INLINE bool quantises_by(float scale) {
  return scale > 0.0f && float_bits(scale) < 0x7f800000u;
}

#if defined(__AVX512F__)

// The low or the high halves of the lanes of two vectors, in turns.
template <int kHigh>
KVLINK_INLINE __m512i interleave_halves(__m512i even, __m512i odd) {
  alignas(64) static constexpr auto kOrder = [] {
    struct Order {
      uint16_t idx[32];
    } order{};
    for (int i = 0; i < 32; ++i) {
      order.idx[i] = static_cast<uint16_t>(i % 2 * 32 + i / 2 * 2 + kHigh);
    }
    return order;
  }();
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(&kOrder), odd);
}

// 32 values in the order of memory, each in 16 bits, without their signs if they are float8.
template <DType kDst>
KVLINK_INLINE __m512i quantise_half(__m512i stored, __m512 scale, __mmask16& nan) {
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(stored, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(stored, _mm512_set1_epi32(-65536)));
  const __m512 values[2] = {_mm512_div_ps(even, scale), _mm512_div_ps(odd, scale)};
  nan = _mm512_cmp_ps_mask(values[0], values[1], _CMP_UNORD_Q);
  __m512i rounded[2];
  if constexpr (kDst == DType::kInt8) {
    KVLINK_UNROLL
    for (int i = 0; i < 2; ++i) {
      // The lesser magnitude, the value's sign.
      const __m512 bounded = _mm512_range_ps(values[i], _mm512_set1_ps(127.0f), 0x2);
      rounded[i] = _mm512_cvt_roundps_epi32(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    return interleave_halves<0>(rounded[0], rounded[1]);
  } else {
    using Type = Float8Of<kDst>;
    KVLINK_UNROLL
    for (int i = 0; i < 2; ++i) {
      // The lesser magnitude, no sign; then Float8::round() with its last line left out.
      const __m512 bounded = _mm512_range_ps(values[i], _mm512_set1_ps(Type::kLargest), 0xa);
      const __m512 exponent = _mm512_castsi512_ps(
          _mm512_and_si512(_mm512_castps_si512(bounded), _mm512_set1_epi32(0x7f800000)));
      const __m512 unit = _mm512_max_ps(exponent, _mm512_set1_ps(Type::kLeastNormal));
      rounded[i] =
          _mm512_castps_si512(_mm512_fmadd_ps(unit, _mm512_set1_ps(1 << Type::kShift), bounded));
    }
    const __m512i mantissas = interleave_halves<0>(rounded[0], rounded[1]);
    const __m512i exponents = interleave_halves<1>(rounded[0], rounded[1]);
    return _mm512_sub_epi16(
        _mm512_add_epi16(mantissas, _mm512_srli_epi16(exponents, Type::kShift - 16)),
        _mm512_set1_epi16(static_cast<int16_t>(Type::kOffset)));
  }
}

// 64 values divided by a scale that quantises_by() accepts; false, and nothing, where one is NaN.
template <DType kDst>
KVLINK_INLINE bool quantise_stripe(const char* src, float scale, Words& words) {
  const __m512i stored[2] = {_mm512_loadu_si512(src), _mm512_loadu_si512(src + 64)};
  const __m512 scales = _mm512_set1_ps(scale);
  __mmask16 nan[2];
  const __m512i low = quantise_half<kDst>(stored[0], scales, nan[0]);
  const __m512i high = quantise_half<kDst>(stored[1], scales, nan[1]);
  if (!_kortestz_mask16_u8(nan[0], nan[1])) return false;
  __m512i mixed;
  if constexpr (kDst == DType::kInt8) {
    mixed = _mm512_packs_epi16(low, high);
  } else {
    // Signs survive packing with saturation.
    const __m512i signs = _mm512_packs_epi16(stored[0], stored[1]);
    mixed = _mm512_ternarylogic_epi32(_mm512_packus_epi16(low, high), signs, _mm512_set1_epi8(-128),
                                      0xf8);  // a | (b & c)
  }
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  words.part[0] = (WordPart)_mm512_permutexvar_epi64(order, mixed);
  return true;
}

#else

template <DType kDst>
KVLINK_INLINE bool quantise_stripe(const char*, float, Words&) {
  return false;
}

#endif

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
