// bfloat16 rows quantised to a byte an element by scales of their own. Such a scale comes from the
// row's largest magnitude, a bfloat16 itself, so its mantissa is one of 128: what becomes of each
// mantissa of a value is known beforehand, and nothing is divided. Included by *_simd.cpp only.
#pragma once

#include "kvlink/base/convert.hpp"
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

// int8: by what to multiply, by the mantissa of the row's largest value, so that the product,
// rounded once to an integer, is what the quotient rounds to. Of quotients that are not halves only
// that of half the largest value is so near one that the last bit matters.
struct Multipliers {
  uint32_t bits[128];

  Multipliers() {
    for (uint32_t most = 0; most < 128; ++most) {
      const float largest = bfloat16_of(most, 0), half = bfloat16_of(most, -1);
      const bool up = half / dynamic_scale(largest, DType::kInt8) >= 63.5f;
      uint32_t multiplier = float_bits(127.0f / largest);
      const auto reaches = [&] {  // exactly
        return static_cast<double>(half) * float_from_bits(multiplier) >= 63.5;
      };
      while (up && !reaches()) ++multiplier;
      while (!up && reaches()) --multiplier;
      bits[most] = multiplier;
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

// Codes by static scales, of one head each. Other types than float8 have none.
template <DType kDst>
class HeadCodes {
 public:
  static constexpr int64_t kScales = 64;

  // Scales 0 .. count - 1, for which `by` has been set.
  void set(const Quantiser<kDst>& by, const float* scales, int64_t count) {
    if constexpr (kDst != DType::kInt8) {
      usable_ = __builtin_cpu_supports("avx512vbmi");
      if (!usable_) return;
      for (int64_t i = 0; i < count; ++i) {
        least_[i] = by.can_divide(i) ? by.least(i) * 0x10001u : 0xffffffffu;
        range_[i] = by.can_divide(i) ? (by.most(i) - by.least(i)) * 0x10001u : 0;
        if (by.can_divide(i)) set_steps(by, scales[i], i);
      }
    }
  }

  // 64 values divided by scale i; false, and anything, where the quotient of one is not normal or
  // needs a bound, or always.
  KVLINK_INLINE bool stripe(const char* src, int64_t i, Words& words) const {
    if (kDst == DType::kInt8 || !usable_) return false;
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

  bool usable_ = false;
  alignas(64) uint8_t step_[kScales][128];
  alignas(64) uint32_t least_[kScales];  // in pairs of 16 bits, as the next
  alignas(64) uint32_t range_[kScales];
};

template <DType kDst>
class RowQuantiser {
 public:
  static constexpr int64_t kScales = 64, kRows = 8;

  RowQuantiser() : table_(shared_table()) {}

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
    const __m256i powers = _mm256_sub_epi32(_mm256_set1_epi32(127), _mm256_srli_epi32(amax, 23));
    _mm256_store_si256(reinterpret_cast<__m256i*>(power_ + first),
                       _mm256_slli_epi32(powers, kPowerShift));
    _mm256_store_si256(reinterpret_cast<__m256i*>(mantissa_ + first),
                       _mm256_and_si256(_mm256_srli_epi32(amax, 16), _mm256_set1_epi32(0x7f)));
    return _mm256_cmpge_epi32_mask(amax, _mm256_set1_epi32(0x7f800000)) & ((1u << count) - 1);
  }

  // Whether row i of the kScales can be taken; others hold a value whose quotient is not normal, or
  // 0, or NaN.
  KVLINK_INLINE bool fits(int64_t i) const { return fits_[i / kRows] >> i % kRows & 1; }

  // Row i, stripe by stripe.
  class Row {
   public:
    KVLINK_INLINE Row(const RowQuantiser& by, int64_t i) {
      if constexpr (kIsInt8) {
        factor_ = _mm512_set1_ps(float_from_bits(by.table_.bits[by.mantissa_[i]] + by.power_[i]));
      } else {
        const uint8_t* steps = by.table_.step[by.mantissa_[i]];
        const __m512i power = _mm512_set1_epi8(static_cast<char>(by.power_[i]));
        low_ = _mm512_add_epi8(_mm512_load_si512(steps), power);
        high_ = _mm512_add_epi8(_mm512_load_si512(steps + 64), power);
      }
    }
    KVLINK_INLINE Words stripe(const char* src) const {
      const __m512i first = _mm512_loadu_si512(src), second = _mm512_loadu_si512(src + 64);
      if constexpr (kIsInt8) {
        const __m512i mixed = _mm512_packs_epi16(round(first), round(second));
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        return {{(WordPart)_mm512_permutexvar_epi64(order, mixed)}};
      } else {
        return look_up_codes<kDst>(first, second, low_, high_);
      }
    }

   private:
    // 32 values in the order of memory, each in 16 bits.
    KVLINK_INLINE __m512i round(__m512i values) const {
      const __m512 magic = _mm512_set1_ps(12582912.0f);  // leaves integers in the low bits
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(values, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(-65536)));
      return interleave_halves(_mm512_castps_si512(_mm512_fmadd_ps(even, factor_, magic)),
                               _mm512_castps_si512(_mm512_fmadd_ps(odd, factor_, magic)));
    }

    __m512i low_, high_;
    __m512 factor_;
  };

 private:
  static constexpr bool kIsInt8 = kDst == DType::kInt8;
  static constexpr int kMantissa = kDst == DType::kFloat8E4M3 ? 3 : 2;
  static constexpr int kPowerShift = kIsInt8 ? 23 : kMantissa;
  using Table = std::conditional_t<kIsInt8, Multipliers, CodeSteps<kDst>>;

  static const Table& shared_table() {
    static const Table table;
    return table;
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

  const Table& table_;
  alignas(32) uint32_t mantissa_[kScales];  // of the rows' largest values
  alignas(32) uint32_t power_[kScales];     // where the code, or the multiplier, has its exponent
  uint8_t fits_[kScales / kRows];
};

#endif

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
