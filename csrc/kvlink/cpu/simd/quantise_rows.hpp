// bfloat16 rows quantised to a byte an element by scales of their own. Such a scale comes from the
// row's largest magnitude, a bfloat16 itself, so its mantissa is one of 128: what becomes of each
// mantissa of a value is known beforehand, and no value is divided. Included by *_simd.cpp only.
#pragma once

#include "kvlink/base/convert.hpp"
#include "kvlink/base/row_digest.hpp"
#include "kvlink/cpu/simd/quantise.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

template <DType kDst>
class HeadCodes;
template <DType kDst>
class RowQuantiser;

#if defined(__AVX512F__)

// A value bit_cast from the 16 bits of a bfloat16 between 1 and 2, and its power of two.
inline float bfloat16_of(uint32_t mantissa, int exponent) {
  return float_from_bits((static_cast<uint32_t>(127 + exponent) << 23) | mantissa << 16);
}

// Added to a float below 2^22, leaves it rounded to an integer in the low bits.
inline constexpr float kRoundInt = 12582912.0f;

// float8: the lowest bits of a value's exponent and the highest ones of its mantissa, where a code
// has its own, and what is to be added to that byte, by the mantissas of the row's largest value
// and of the value itself. For quotients that are normal numbers of the type.
template <DType kDst>
struct CodeSteps {
  static constexpr int kMantissa = kDst == DType::kFloat8E4M3 ? 3 : 2;

  alignas(64) uint8_t step[128][128];

  CodeSteps() {
    for (uint32_t most = 0; most < 128; ++most) {
      const float scale = dynamic_scale(bfloat16_of(most, 0), kDst);
      for (uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
        constexpr int kExponent = -4;
        const uint32_t code = Storage<kDst>::store(bfloat16_of(mantissa, kExponent) / scale);
        const uint32_t top = (127 + kExponent) << kMantissa | mantissa >> (7 - kMantissa);
        step[most][mantissa] = static_cast<uint8_t>(code - top);
      }
    }
  }
};

// 64 codes of float8. `low` and `high` are the steps of the 128 mantissas, the power of two that
// the scale divides by included.
template <DType kDst>
KVLINK_INLINE Words look_up_codes(__m512i first, __m512i second, __m512i low, __m512i high) {
  // Of each four values: four bytes that become the codes, four that begin with the mantissas.
  constexpr int64_t kTop = 7 - CodeSteps<kDst>::kMantissa;
  const __m512i bits = _mm512_set1_epi64(0x3020100000000000 | (kTop * 0x01010101 + 0x30201000));
  __m512i parts[2];
  __asm__("vpmultishiftqb %1, %2, %0" : "=v"(parts[0]) : "v"(first), "v"(bits));
  __asm__("vpmultishiftqb %1, %2, %0" : "=v"(parts[1]) : "v"(second), "v"(bits));
  const __m512 a = _mm512_castsi512_ps(parts[0]), b = _mm512_castsi512_ps(parts[1]);
  // Mantissas are in seven bits; the eighth is not looked at.
  __m512i step = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
  __asm__("vpermi2b %2, %1, %0" : "+v"(step) : "v"(low), "v"(high));
  const __m512i codes = _mm512_add_epi8(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), step);
  // Signs survive packing with saturation.
  const __m512i mixed = _mm512_ternarylogic_epi32(codes, _mm512_packs_epi16(first, second),
                                                  _mm512_set1_epi8(-128), 0xf8);  // a | (b & c)
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return {{(WordPart)_mm512_permutexvar_epi64(order, mixed)}};
}

// Codes by static scales, of one head each.
template <DType kDst>
class HeadCodes {
 public:
  static constexpr int64_t kScales = 64;

  // Scales 0 .. count - 1, for which `by` has been set. False if not all of them have codes.
  bool set(const Quantiser<kDst>& by, const float* scales, int64_t count) {
    if (!__builtin_cpu_supports("avx512vbmi")) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (!by.can_divide(i)) return false;
      least_[i] = by.least(i) * 0x10001u;
      range_[i] = (by.most(i) - by.least(i)) * 0x10001u;
      set_steps(by, scales[i], i);
    }
    return true;
  }

  // 64 values divided by scale i; false, and anything, where the quotient of one is not normal or
  // needs a bound.
  KVLINK_INLINE bool stripe(const char* src, int64_t i, Words& words) const {
    const __m512i first = _mm512_loadu_si512(src), second = _mm512_loadu_si512(src + 64);
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), least = _mm512_set1_epi32(least_[i]);
    const __m512i above =
        _mm512_max_epu16(_mm512_sub_epi16(_mm512_and_si512(first, magnitude), least),
                         _mm512_sub_epi16(_mm512_and_si512(second, magnitude), least));
    words = look_up_codes<kDst>(first, second, _mm512_load_si512(step_[i]),
                                _mm512_load_si512(step_[i] + 64));
    return _mm512_cmpgt_epu16_mask(above, _mm512_set1_epi32(range_[i])) == 0;
  }

 private:
  void set_steps(const Quantiser<kDst>& by, float scale, int64_t i) {
    constexpr int kMantissa = CodeSteps<kDst>::kMantissa;
    const uint32_t exponent = float_bits(scale) >> 23;
    alignas(64) uint16_t values[128];
    for (uint32_t j = 0; j < 128; ++j) values[j] = static_cast<uint16_t>(exponent << 7 | j);
    for (int half = 0; half < 2; ++half) {
      Words codes;
      by.stripe(reinterpret_cast<const char*>(values + 64 * half), i, codes);
      codes.store(step_[i] + 64 * half);
    }
    for (uint32_t j = 0; j < 128; ++j) {
      step_[i][j] -= static_cast<uint8_t>(values[j] >> (7 - kMantissa));
    }
  }

  alignas(64) uint8_t step_[kScales][128];
  alignas(64) uint32_t least_[kScales];  // in pairs of 16 bits, as the next
  alignas(64) uint32_t range_[kScales];
};

// 64 codes of int8, none beyond 128, which becomes 127: products, rounded once.
KVLINK_INLINE Words round_products(__m512i first, __m512i second, __m512 factor) {
  const auto round = [&](__m512i values) {  // in the order of memory, each in 16 bits
    const __m512 magic = _mm512_set1_ps(kRoundInt);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(values, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(-65536)));
    return interleave_halves(_mm512_castps_si512(_mm512_fmadd_ps(even, factor, magic)),
                             _mm512_castps_si512(_mm512_fmadd_ps(odd, factor, magic)));
  };
  const __m512i mixed = _mm512_packs_epi16(round(first), round(second));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return {{(WordPart)_mm512_permutexvar_epi64(order, mixed)}};
}

// The same of int8: products instead of quotients, by scales for which that was tried. Only a value
// that is the nearest bfloat16 to half an integer times the scale may come so near a half that the
// last bit matters; those are all tried.
template <>
class HeadCodes<DType::kInt8> {
 public:
  static constexpr int64_t kScales = 64;

  bool set(const Quantiser<DType::kInt8>& by, const float* scales, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (!by.can_divide(i) || !find_factor(scales[i], factor_[i])) return false;
      end_[i] = (by.most(i) + 1) * 0x10001u;
    }
    return true;
  }

  // 64 values divided by scale i; false, and anything, where one is NaN.
  KVLINK_INLINE bool stripe(const char* src, int64_t i, Words& words) const {
    const __m512i first = _mm512_loadu_si512(src), second = _mm512_loadu_si512(src + 64);
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), end = _mm512_set1_epi32(end_[i]);
    const __m512i low_end = _mm512_or_si512(end, _mm512_set1_epi16(INT16_MIN));
    const auto bounded = [&](__m512i value) {  // as numbers without sign, negative ones are last
      return _mm512_min_epu16(_mm512_min_epi16(value, end), low_end);
    };
    words = round_products(bounded(first), bounded(second), _mm512_set1_ps(factor_[i]));
    // The bound's product is 127 or 128.
    words.part[0] = (WordPart)_mm512_max_epi8((__m512i)words.part[0], _mm512_set1_epi8(-127));
    const __m512i most =
        _mm512_max_epu16(_mm512_and_si512(first, magnitude), _mm512_and_si512(second, magnitude));
    return _mm512_cmpgt_epu16_mask(most, _mm512_set1_epi16(0x7f80)) == 0;
  }

 private:
  static bool find_factor(float scale, float& factor) {
    const uint32_t nearest = float_bits(1.0f / scale);
    constexpr uint32_t kSteps[] = {0, 1, ~uint32_t{0}};
    for (const uint32_t step : kSteps) {
      factor = float_from_bits(nearest + step);
      if (rounds_right(scale, factor)) return true;
    }
    return false;
  }

  static bool rounds_right(float scale, float factor) {
    const __m512 magic = _mm512_set1_ps(kRoundInt), by = _mm512_set1_ps(scale);
    __m512 half = _mm512_setr_ps(0.5f, 1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f, 8.5f, 9.5f, 10.5f,
                                 11.5f, 12.5f, 13.5f, 14.5f, 15.5f);
    __mmask16 wrong = 0;
    for (int i = 0; i < 8; ++i) {
      const __m512i near =
          _mm512_add_epi32(_mm512_castps_si512(_mm512_mul_ps(half, by)), _mm512_set1_epi32(0x8000));
      const __m512 value = _mm512_castsi512_ps(_mm512_and_si512(near, _mm512_set1_epi32(-65536)));
      const __m512 quotient = _mm512_add_ps(_mm512_div_ps(value, by), magic);
      const __m512 product = _mm512_fmadd_ps(value, _mm512_set1_ps(factor), magic);
      wrong |= _mm512_cmp_ps_mask(product, quotient, _CMP_NEQ_UQ);
      half = _mm512_add_ps(half, _mm512_set1_ps(16.0f));
    }
    return wrong == 0;
  }

  alignas(64) float factor_[kScales];
  alignas(64) uint32_t end_[kScales];  // after the largest bfloat16 that needs no bound, in pairs
};

template <DType kDst>
class RowQuantiser {
 public:
  static constexpr int64_t kScales = 64, kRows = 8;

  RowQuantiser() : steps_(shared_steps()) {}

  // Whether this CPU can take rows of so many elements.
  static bool takes(int64_t dims) {
    return dims % 64 == 0 && (kIsInt8 || __builtin_cpu_supports("avx512vbmi"));
  }

  // Scales of 1 to kRows rows, `first` and the next ones of kScales, by dynamic_scale(); kRows of
  // them are written. Returns bits of the rows whose scales are not right, because they hold
  // infinity or NaN.
  template <typename Row>
  KVLINK_INLINE uint32_t find_scales(const Row& row_at, int64_t count, int64_t dims, int64_t first,
                                     float* scales) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most[kRows], least[kRows];
    KVLINK_UNROLL
    for (int64_t i = 0; i < kRows; ++i) {
      const char* row = row_at(i < count ? i : 0);
      most[i] = least[i] = _mm512_and_si512(magnitude, _mm512_loadu_si512(row));
      KVLINK_UNROLL_BY(4)
      for (int64_t j = 32; j < dims; j += 32) {
        const __m512i next = _mm512_and_si512(magnitude, _mm512_loadu_si512(row + j * 2));
        most[i] = _mm512_max_epu16(most[i], next);
        if (!kIsInt8) least[i] = _mm512_min_epu16(least[i], next);
      }
    }
    const __m256i amax =
        _mm256_and_si256(fold(most, [](__m512i a, __m512i b) { return _mm512_max_epu16(a, b); }),
                         _mm256_set1_epi32(-65536));
    const __m256 quotient =
        _mm256_div_ps(_mm256_castsi256_ps(amax), _mm256_set1_ps(dtype_quant_max(kDst)));
    const __mmask8 any = _mm256_cmp_ps_mask(quotient, _mm256_set1_ps(1.17549435e-38f), _CMP_GE_OQ);
    const __m256 scale = _mm256_mask_mov_ps(_mm256_set1_ps(1.0f), any, quotient);
    _mm256_storeu_ps(scales, scale);
    const __m256i bits = _mm256_castps_si256(scale);
    // Far from subnormal numbers; a scale that stands for another one is not by the largest value.
    __mmask8 fits = _mm256_mask_cmplt_epu32_mask(
        any, _mm256_sub_epi32(bits, _mm256_set1_epi32((127 - 64) << 23)),
        _mm256_set1_epi32(128 << 23));
    if constexpr (!kIsInt8) {
      const __m256i smallest = _mm256_srli_epi32(
          fold(least, [](__m512i a, __m512i b) { return _mm512_min_epu16(a, b); }), 16);
      constexpr int kToLeast = static_cast<int>(Float8Of<kDst>::kLeastBits >> 16) - (127 << 7);
      const __m256i normal =
          _mm256_add_epi32(_mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0xffff)), 16),
                           _mm256_set1_epi32(kToLeast));
      fits = _mm256_mask_cmpge_epu32_mask(fits, smallest, normal);
    }
    fits_[first / kRows] = fits;
    if constexpr (kIsInt8) {
      set_factors(_mm256_castsi256_ps(amax), scale, first);
    } else {
      const __m256i powers = _mm256_sub_epi32(_mm256_set1_epi32(127), _mm256_srli_epi32(amax, 23));
      store(power_ + first, _mm256_slli_epi32(powers, kMantissa));
      store(mantissa_ + first,
            _mm256_and_si256(_mm256_srli_epi32(amax, 16), _mm256_set1_epi32(0x7f)));
    }
    const __m512i wide =
        _mm512_or_si512(_mm512_cvtepu32_epi64(bits), _mm512_set1_epi64(int64_t{1} << 32));
    _mm512_store_si512(
        shift_ + first,
        _mm512_mullo_epi64(wide, _mm512_set1_epi64(static_cast<int64_t>(row_digest::kStep))));
    return _mm256_cmpge_epi32_mask(amax, _mm256_set1_epi32(0x7f800000)) & ((1u << count) - 1);
  }

  // Bits of those of the kRows rows from `first` on that can be taken; others hold a value whose
  // quotient is not normal, or 0, or NaN.
  KVLINK_INLINE uint32_t fits(int64_t first) const {
    return fits_[static_cast<uint64_t>(first) / kRows];
  }
  // row_digest::scale_shift() of scale i.
  KVLINK_INLINE uint64_t shift(int64_t i) const { return shift_[i]; }

  // Row i, stripe by stripe.
  class Row {
   public:
    KVLINK_INLINE Row(const RowQuantiser& by, int64_t i) {
      if constexpr (kIsInt8) {
        factor_ = _mm512_set1_ps(by.factor_[i]);
      } else {
        const uint8_t* steps = by.steps_.step[by.mantissa_[i]];
        const __m512i power = _mm512_set1_epi8(static_cast<char>(by.power_[i]));
        low_ = _mm512_add_epi8(_mm512_load_si512(steps), power);
        high_ = _mm512_add_epi8(_mm512_load_si512(steps + 64), power);
      }
    }
    KVLINK_INLINE Words stripe(const char* src) const {
      const __m512i first = _mm512_loadu_si512(src), second = _mm512_loadu_si512(src + 64);
      if constexpr (kIsInt8) {
        return round_products(first, second, factor_);
      } else {
        return look_up_codes<kDst>(first, second, low_, high_);
      }
    }

   private:
    __m512i low_, high_;
    __m512 factor_;
  };

 private:
  static constexpr bool kIsInt8 = kDst == DType::kInt8;
  static constexpr int kMantissa = kDst == DType::kFloat8E4M3 ? 3 : 2;
  struct NoSteps {};
  using Steps = std::conditional_t<kIsInt8, NoSteps, CodeSteps<kDst>>;

  static const Steps& shared_steps() {
    static const Steps steps;
    return steps;
  }
  static KVLINK_INLINE void store(uint32_t* target, __m256i values) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(target), values);
  }

  // int8: by what to multiply, so that the product, rounded once to an integer, is what the
  // quotient rounds to. Of quotients that are not halves only that of half the largest value is so
  // near one that the last bit matters, and one unit of it is enough.
  KVLINK_INLINE void set_factors(__m256 amax, __m256 scale, int64_t first) {
    const __m256 turn = _mm256_set1_ps(63.5f), half = _mm256_mul_ps(amax, _mm256_set1_ps(0.5f));
    const __m256 factor = _mm256_div_ps(_mm256_set1_ps(127.0f), amax);
    const __mmask8 up = _mm256_cmp_ps_mask(_mm256_div_ps(half, scale), turn, _CMP_GE_OQ);
    const __mmask8 reaches = _mm256_cmp_ps_mask(_mm256_fmsub_ps(half, factor, turn),
                                                _mm256_setzero_ps(), _CMP_GE_OQ);  // exactly
    const __m256i one = _mm256_set1_epi32(1);
    __m256i bits = _mm256_castps_si256(factor);
    bits = _mm256_mask_add_epi32(bits, up & ~reaches, bits, one);
    bits = _mm256_mask_sub_epi32(bits, ~up & reaches, bits, one);
    _mm256_store_ps(factor_ + first, _mm256_castsi256_ps(bits));
  }

  // One number of 16 bits of each row by `op`, twice, in the row's lane.
  template <typename Op>
  static KVLINK_INLINE __m256i fold(const __m512i (&rows)[kRows], const Op& op) {
    __m512i halves[4], quarters[2];
    KVLINK_UNROLL
    for (int i = 0; i < 4; ++i) {
      halves[i] = op(_mm512_shuffle_i64x2(rows[2 * i], rows[2 * i + 1], 0x44),
                     _mm512_shuffle_i64x2(rows[2 * i], rows[2 * i + 1], 0xee));
    }
    KVLINK_UNROLL
    for (int i = 0; i < 2; ++i) {
      quarters[i] = op(_mm512_shuffle_i64x2(halves[2 * i], halves[2 * i + 1], 0x88),
                       _mm512_shuffle_i64x2(halves[2 * i], halves[2 * i + 1], 0xdd));
    }
    // Words of 64 bits: rows 0, 4, 1, 5, 2, 6, 3, 7.
    __m512i all = op(_mm512_unpacklo_epi64(quarters[0], quarters[1]),
                     _mm512_unpackhi_epi64(quarters[0], quarters[1]));
    all = op(all, _mm512_shuffle_epi32(all, _MM_PERM_CDAB));
    all = op(all, _mm512_rol_epi32(all, 16));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, all));
  }

  const Steps& steps_;
  alignas(32) float factor_[kScales];       // int8
  alignas(32) uint32_t mantissa_[kScales];  // float8: of the rows' largest values
  alignas(32) uint32_t power_[kScales];     // where the code has its exponent
  alignas(64) uint64_t shift_[kScales];
  uint8_t fits_[kScales / kRows];
};

#endif

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
