// float8 rows widened to bfloat16: the same results as by rows.hpp and narrow.hpp in half the
// instructions. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/words.hpp"

#if defined(__AVX512F__)

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// 32 elements of float8 e4m3 times a scale, as bfloat16. `scale` times 256 is finite.
KVLINK_INLINE Words widen_e4m3(const char* src, float scale) {
  const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)src));
  // Exponent and mantissa where a float16 has its own: the value / 256.
  const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(codes, 7),
                                          _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m512 factor = _mm512_set1_ps(scale * 256.0f);
  const auto scaled = [&](__m256i values) {  // in the upper half of each lane, rounded
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtph_ps(values), factor));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1));
  };
  alignas(64) static constexpr auto kUpper = [] {
    struct Order {
      uint16_t idx[32];
    } order{};
    for (int i = 0; i < 32; ++i) order.idx[i] = static_cast<uint16_t>(2 * i + 1);
    return order;
  }();
  const __m512i values =
      _mm512_permutex2var_epi16(scaled(_mm512_castsi512_si256(halves)), _mm512_load_si512(&kUpper),
                                scaled(_mm512_extracti64x4_epi64(halves, 1)));
  const __m512i magnitude = _mm512_set1_epi16(0x3f80), nan = _mm512_set1_epi16(0x7ff0);
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, magnitude), magnitude);
  const __m512i signed_nan =
      _mm512_ternarylogic_epi32(nan, halves, _mm512_set1_epi16(static_cast<int16_t>(0x8000)),
                                0xf8);  // a | (b & c)
  return {{(WordPart)_mm512_mask_mov_epi16(values, is_nan, signed_nan)}};
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL

#endif
