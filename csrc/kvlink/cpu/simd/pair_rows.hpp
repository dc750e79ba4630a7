// Stored elements as pairs of bfloat16 side by side in 32 bits, for CPUs that add the two products
// of a pair with one instruction. Every stored type of one byte is exact in bfloat16: the bytes of
// its words are looked up by the magnitude of its code, and the sign is put back.
#pragma once

#include "kvlink/cpu/simd/rows.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

#if defined(__AVX512F__)

// AVX512_BF16 for the products, AVX512_VBMI for looking bytes up.
inline bool has_pair_products() {
  static const bool has =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return has;
}

// Bytes of two registers by index (0 to 127; bit 7 does not matter).
// NOTE: as text, so that the level need not be compiled for CPUs that have it.
KVLINK_INLINE VecU pick_bytes(VecU index, VecU first, VecU second) {
  __asm__("vpermi2b %2, %1, %0" : "+v"(index) : "v"(first), "v"(second));
  return index;
}

// Two vectors as bfloat16, rounded to nearest even: the first below the second.
KVLINK_INLINE VecU narrow_to_words(Vec first, Vec second) {
  VecU words;
  __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(words) : "v"(second), "v"(first));
  return words;
}

struct alignas(64) Bytes128 {
  uint8_t at[128];
  KVLINK_INLINE VecU first() const { return load_unaligned<VecU>(at); }
  KVLINK_INLINE VecU second() const { return load_unaligned<VecU>(at + 64); }
};

// bfloat16 of a magnitude: of an int8 its absolute value, else the code without its sign.
template <DType kDType>
constexpr uint16_t word_of(int magnitude) {
  constexpr bool kInt = kDType == DType::kInt8;
  constexpr int kMantissa = kInt ? 0 : kDType == DType::kFloat8E4M3 ? 3 : 2;
  if (magnitude == 0) return 0;
  if (kDType == DType::kFloat8E4M3 && magnitude == 127) return 0x7fc0;
  if (kDType == DType::kFloat8E5M2 && magnitude >= 124) return magnitude == 124 ? 0x7f80 : 0x7fc0;
  constexpr int kBias = kInt ? 0 : kDType == DType::kFloat8E4M3 ? 7 : 15;
  int exponent = kInt ? 0 : magnitude >> kMantissa;
  int mantissa = kInt ? magnitude : magnitude & ((1 << kMantissa) - 1);
  if (!kInt && exponent > 0) mantissa += 1 << kMantissa;
  if (!kInt && exponent == 0) exponent = 1;
  // The value is mantissa * 2^(exponent - bias - kMantissa).
  int top = 0;
  while (mantissa >> (top + 1)) ++top;
  const int biased = exponent - kBias - kMantissa + top + 127;
  return static_cast<uint16_t>(biased << 7 | ((mantissa << 7 >> top) & 0x7f));
}

template <DType kDType, int kShift>
constexpr Bytes128 bytes_of_words() {
  Bytes128 bytes{};
  for (int i = 0; i < 128; ++i) bytes.at[i] = static_cast<uint8_t>(word_of<kDType>(i) >> kShift);
  return bytes;
}
template <DType kDType>
inline constexpr Bytes128 kLowBytes = bytes_of_words<kDType, 0>();
template <DType kDType>
inline constexpr Bytes128 kHighBytes = bytes_of_words<kDType, 8>();

struct WordBytes {
  VecU low, high;
};

// The bytes of the words of 64 codes.
template <DType kDType>
KVLINK_INLINE WordBytes look_up(VecU codes) {
  constexpr bool kInt = kDType == DType::kInt8;
  const VecU index = kInt ? (VecU)_mm512_abs_epi8((__m512i)codes) : codes;
  const Bytes128 &low = kLowBytes<kDType>, &high = kHighBytes<kDType>;
  VecU top = pick_bytes(index, high.first(), high.second()) | (codes & 0x80808080u);
  if constexpr (kInt) {  // -128, whose magnitude has no place in the table
    const __m512i least = _mm512_set1_epi8(-128);
    top = (VecU)_mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask((__m512i)codes, least), (__m512i)top,
                                       _mm512_set1_epi8(static_cast<char>(0xc3)));
  }
  return {pick_bytes(index, low.first(), low.second()), top};
}

struct alignas(64) Index64 {
  uint8_t at[64];
  KVLINK_INLINE VecU load() const { return load_unaligned<VecU>(at); }
};
// Byte i of the result is byte pick(i) of two registers.
template <class Pick>
constexpr Index64 make_index(Pick pick) {
  Index64 index{};
  for (int i = 0; i < 64; ++i) index.at[i] = static_cast<uint8_t>(pick(i));
  return index;
}
// Of low and high bytes: words one after the other.
inline constexpr Index64 kInOrder = make_index([](int i) { return i / 2 + i % 2 * 64; });
// Of two rows: bytes of one dim side by side, those of dims kFrom + 16 behind those of kFrom in
// every 128-bit part.
template <int kFrom>
inline constexpr Index64 kSideBySide =
    make_index([](int i) { return kFrom + i % 16 / 8 * 16 + i / 16 * 4 + i % 8 / 2 + i % 2 * 64; });
// Words of dims kFrom to kFrom + 15 of two rows side by side.
template <int kFrom>
KVLINK_INLINE VecU pair_words(VecU first, VecU second) {
  VecU index = (VecU)lane_indices();
  index = index + kFrom + ((index + (kFrom + 32)) << 16);
  return (VecU)_mm512_permutex2var_epi16((__m512i)first, (__m512i)index, (__m512i)second);
}

// 16, 32 or 64 bytes; above them is anything.
template <int kBytes>
KVLINK_INLINE VecU load_bytes(const char* source) {
  if constexpr (kBytes >= 64) {
    return load_unaligned<VecU>(source);
  } else if constexpr (kBytes == 32) {
    return (VecU)_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)source));
  } else {
    return (VecU)_mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)source));
  }
}

template <DType kDType>
struct Pairs {
  static_assert(kDType == DType::kBFloat16 || dtype_bytes(kDType) == 1);
  static constexpr int kElementBytes = dtype_bytes(kDType);
  static constexpr int kVecs = 2 / kElementBytes;  // vectors of pairs in a stored vector

  // All pairs of neighbours.
  static KVLINK_INLINE void in_order(VecU stored, Vec (&pairs)[kVecs]) {
    if constexpr (kVecs == 1) {
      pairs[0] = from_bits(stored);
    } else {
      // Each 128-bit part gets 8 bytes of the first half and 8 of the second.
      const __m512i parts =
          _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), (__m512i)stored);
      const WordBytes bytes = look_up<kDType>((VecU)parts);
      pairs[0] = (Vec)_mm512_unpacklo_epi8((__m512i)bytes.low, (__m512i)bytes.high);
      pairs[1] = (Vec)_mm512_unpackhi_epi8((__m512i)bytes.low, (__m512i)bytes.high);
    }
  }

  // kLanes pairs of neighbours.
  static KVLINK_INLINE Vec neighbours(VecU stored) {
    if constexpr (kVecs == 1) return from_bits(stored);
    const WordBytes bytes = look_up<kDType>(stored);
    return from_bits(pick_bytes(kInOrder.load(), bytes.low, bytes.high));
  }

  // Pairs of what two rows have at the same dim.
  template <int kVecs>
  static KVLINK_INLINE void side_by_side(const char* first, const char* second,
                                         Vec (&pairs)[kVecs]) {
    static_assert(kVecs == 1 || kVecs % 2 == 0);
    constexpr int kBytes = kVecs * kLanes * kElementBytes;
    KVLINK_UNROLL
    for (int at = 0; at < kBytes; at += 64) {
      join(load_bytes<kBytes>(first + at), load_bytes<kBytes>(second + at), at, pairs);
    }
  }
  // Of the first `count` < kLanes dims, zeros after them; reads nothing past the last.
  static KVLINK_INLINE void some_side_by_side(const char* first, const char* second, int64_t count,
                                              Vec (&pairs)[1]) {
    join(load_some_bytes(first, count * kElementBytes),
         load_some_bytes(second, count * kElementBytes), 0, pairs);
  }

 private:
  template <int kVecs>
  static KVLINK_INLINE void join(VecU first, VecU second, int at, Vec (&pairs)[kVecs]) {
    Vec* target = pairs + at / kLanes / kElementBytes;
    if constexpr (kElementBytes == 2) {
      target[0] = from_bits(pair_words<0>(first, second));
      if constexpr (kVecs > 1) target[1] = from_bits(pair_words<kLanes>(first, second));
    } else {
      join_bytes<kSideBySide<0>, kVecs>(first, second, target);
      if constexpr (kVecs > 2) join_bytes<kSideBySide<32>, kVecs>(first, second, target + 2);
    }
  }
  template <const Index64& kIndex, int kVecs>
  static KVLINK_INLINE void join_bytes(VecU first, VecU second, Vec* target) {
    const WordBytes bytes = look_up<kDType>(pick_bytes(kIndex.load(), first, second));
    const auto low = (__m512i)bytes.low, high = (__m512i)bytes.high;
    target[0] = (Vec)_mm512_unpacklo_epi8(low, high);
    if constexpr (kVecs > 1) target[1] = (Vec)_mm512_unpackhi_epi8(low, high);
  }
};

#endif

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
