// bfloat16 rows quantised to a byte an element, the move that prefill and decode make most: the
// same results as narrow.hpp's in half the instructions. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/narrow.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// Whether there is a Quantiser for the conversion.
template <DType kSrc, DType kDst>
inline constexpr bool kQuantises =
#if defined(__AVX512F__)
    kSrc == DType::kBFloat16 && Row<kDst>::kBytes == 1;
#else
    false;
#endif

template <DType kDst>
class Quantiser;

#if defined(__AVX512F__)

// The low halves of the lanes of two vectors, in turns.
KVLINK_INLINE __m512i interleave_halves(__m512i even, __m512i odd) {
  alignas(64) static constexpr auto kOrder = [] {
    struct Order {
      uint16_t idx[32];
    } order{};
    for (int i = 0; i < 32; ++i) order.idx[i] = static_cast<uint16_t>(i % 2 * 32 + i / 2 * 2);
    return order;
  }();
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(&kOrder), odd);
}

// Divides by one of a few scales, and rounds.
template <DType kDst>
class Quantiser {
 public:
  static constexpr int64_t kScales = 64, kRows = 8;

  // Scales of up to kRows rows that get one of their own, by dynamic_scale(). Returns bits of the
  // rows whose scales are not set, because they hold infinity or NaN.
  template <typename Row>
  static KVLINK_INLINE uint32_t find_scales(const Row& row_at, int64_t count, int64_t dims,
                                            float* scales) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i parts[kRows / 4] = {};  // eight values a row
    for (int64_t i = 0; i < count; ++i) {
      const char* row = row_at(i);
      __m512i most = _mm512_setzero_si512();
      int64_t j = 0;
      KVLINK_UNROLL_BY(2)
      for (; j + 32 <= dims; j += 32) {
        most = _mm512_max_epu16(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(row + j * 2)));
      }
      if (j < dims) {
        const __m512i rest = load_some(row + j * 2, dims - j);
        most = _mm512_max_epu16(most, _mm512_and_si512(magnitude, rest));
      }
      const __m256i half =
          _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
      const __m128i quarter =
          _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      _mm_store_si128(reinterpret_cast<__m128i*>(parts) + i, quarter);
    }
    __m512i amax = _mm512_setzero_si512();
    KVLINK_UNROLL
    for (int i = 0; i < kRows / 4; ++i) {
      __m512i most = parts[i];
      most = _mm512_max_epu16(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
      most = _mm512_max_epu16(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
      most = _mm512_max_epu16(most, _mm512_slli_epi32(most, 16));
      amax = _mm512_mask_mov_epi32(amax, static_cast<__mmask16>(0x1111 << i), most);
    }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    amax = _mm512_and_si512(_mm512_permutexvar_epi32(order, amax), _mm512_set1_epi32(-65536));
    const __m512 scale =
        _mm512_div_ps(_mm512_castsi512_ps(amax), _mm512_set1_ps(dtype_quant_max(kDst)));
    const __m512 least = _mm512_set1_ps(1.17549435e-38f);
    const __mmask16 any = _mm512_cmp_ps_mask(scale, least, _CMP_GE_OQ);
    const __m512 found = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), any, scale);
    _mm512_mask_storeu_ps(scales, (1u << kRows) - 1, found);
    return _mm512_cmpge_epi32_mask(amax, _mm512_set1_epi32(0x7f800000)) & ((1u << count) - 1);
  }

  // Scales first .. first + count - 1 of the few.
  KVLINK_INLINE void set_scales(const float* scales, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      const float scale = *scales++;
      const uint32_t bits = float_bits(scale);
      const float high = 1.0f / scale;
      high_[i] = high;
      low_[i] = __builtin_fmaf(-high, scale, 1.0f) * high;
      // Within these, all that matters stays a normal float.
      const bool usual = bits - kLeastScale < kLargestScale - kLeastScale;
      const bool exact = (bits & 0x7fffffu) != 0x7fffffu;  // see divide()
      // A little more than the largest value rounds to it, too.
      const uint32_t most = (float_bits(dtype_quant_max(kDst) * scale) + 16) >> 16;
      most_[i] = usual && exact ? most * 0x10001u : 0;
      if constexpr (kDst != DType::kInt8) {
        const uint32_t least =
            ((bits + 0xffff) >> 16) + (Float8Of<kDst>::kLeastBits >> 16) - (127u << 7);
        least_[i] = least * 0x10001u;
      }
    }
  }
  // Whether scale i is not one of the few, or of the odd ones, that this cannot divide by.
  KVLINK_INLINE bool can_divide(int64_t i) const { return most_[i] != 0; }
  // Bits of the smallest bfloat16 whose quotient by scale i is a normal float8, and of the largest
  // one that needs no bound; of scales that this can divide by.
  uint32_t least(int64_t i) const { return least_[i] & 0xffff; }
  uint32_t most(int64_t i) const { return most_[i] & 0xffff; }

  // 64 values divided by scale i; false, and anything, where one is too large, or NaN.
  KVLINK_INLINE bool stripe(const char* src, int64_t i, Words& words) const {
    return stripe(_mm512_loadu_si512(src), _mm512_loadu_si512(src + 64), i, words);
  }
  // `count` < 64 values, and zeros.
  KVLINK_INLINE bool some(const char* src, int64_t count, int64_t i, Words& words) const {
    return stripe(load_some(src, count), load_some(src + 64, count - 32), i, words);
  }

 private:
  static constexpr uint32_t kLeastScale = (127u - 64) << 23, kLargestScale = (127u + 64) << 23;

  // The first 32 elements of 16 bits, or `count` where that is less; zeros after them.
  static KVLINK_INLINE __m512i load_some(const char* src, int64_t count) {
    const int64_t bits = count < 0 ? 0 : count < 32 ? count : 32;
    return _mm512_maskz_loadu_epi16(static_cast<uint32_t>((uint64_t{1} << bits) - 1), src);
  }

  KVLINK_INLINE bool stripe(__m512i first, __m512i second, int64_t i, Words& words) const {
    __mmask32 beyond[2];
    const __m512i low = half(first, i, beyond[0]);
    const __m512i high = half(second, i, beyond[1]);
    __m512i mixed;
    if constexpr (kDst == DType::kInt8) {
      mixed = _mm512_packs_epi16(low, high);
    } else {
      // Signs survive packing with saturation.
      mixed = _mm512_ternarylogic_epi32(_mm512_packus_epi16(low, high),
                                        _mm512_packs_epi16(first, second), _mm512_set1_epi8(-128),
                                        0xf8);  // a | (b & c)
    }
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    words.part[0] = (WordPart)_mm512_permutexvar_epi64(order, mixed);
    return _kortestz_mask32_u8(beyond[0], beyond[1]);
  }

  // The quotient, rounded once. NOTE: this was tried for all mantissas of a bfloat16 and of a
  // scale. It is one unit off for ten scales, far from where a rounding to fewer bits turns, and
  // for the mantissa that can_divide() leaves out.
  KVLINK_INLINE __m512 divide(__m512i value, int64_t i) const {
    const __m512 x = _mm512_castsi512_ps(value);
    return _mm512_fmadd_ps(x, _mm512_set1_ps(high_[i]), _mm512_mul_ps(x, _mm512_set1_ps(low_[i])));
  }

  // 32 values in the order of memory, each in 16 bits, without their signs if they are float8.
  KVLINK_INLINE __m512i half(__m512i stored, int64_t i, __mmask32& beyond) const {
    const __m512i upper = _mm512_set1_epi32(-65536);
    const __m512i magnitude = _mm512_and_si512(stored, _mm512_set1_epi16(0x7fff));
    beyond = _mm512_cmpgt_epu16_mask(magnitude, _mm512_set1_epi32(most_[i]));
    if constexpr (kDst == DType::kInt8) {
      const __m512 even = divide(_mm512_slli_epi32(stored, 16), i);
      const __m512 odd = divide(_mm512_and_si512(stored, upper), i);
      return interleave_halves(nearest(even), nearest(odd));
    } else {
      // Float8::round(), whose exponents are here those of the values less that of the scale.
      using Type = Float8Of<kDst>;
      const __m512i exponents = _mm512_and_si512(
          _mm512_subs_epu16(magnitude, _mm512_set1_epi32(least_[i])), _mm512_set1_epi16(0x7f80));
      const __m512i addends = _mm512_add_epi16(
          exponents, _mm512_set1_epi16((Type::kLeastBits >> 16) + (Type::kShift << 7)));
      const __m512 even = divide(_mm512_slli_epi32(magnitude, 16), i);
      const __m512 odd = divide(_mm512_and_si512(magnitude, upper), i);
      return _mm512_add_epi16(interleave_halves(add(even, _mm512_slli_epi32(addends, 16)),
                                                add(odd, _mm512_and_si512(addends, upper))),
                              _mm512_srli_epi16(exponents, Type::kShift - 16));
    }
  }

  static KVLINK_INLINE __m512i nearest(__m512 x) {
    return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static KVLINK_INLINE __m512i add(__m512 x, __m512i addend) {
    return _mm512_castps_si512(_mm512_add_ps(x, _mm512_castsi512_ps(addend)));
  }

  alignas(64) float high_[kScales];
  alignas(64) float low_[kScales];
  // bfloat16s, in pairs: where quotients become normal, and the largest that needs no bound.
  alignas(64) uint32_t least_[kScales];
  alignas(64) uint32_t most_[kScales];
};

#endif

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
