// Stripes of 64 bytes as eight little-endian words, in vectors of the level being compiled, and the
// vector form of base/row_digest.hpp over them. Included by *_simd.cpp only.
#pragma once

#include "kvlink/base/row_digest.hpp"
#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

typedef uint64_t WordPart __attribute__((vector_size(4 * kLanes)));
inline constexpr int kWordParts = 16 / kLanes;

struct Words {
  WordPart part[kWordParts];

  static KVLINK_INLINE Words zero() {
    Words words;
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) words.part[i] = WordPart{};
    return words;
  }
  static KVLINK_INLINE Words load(const void* source) {
    Words words;
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) {
      words.part[i] =
          load_unaligned<WordPart>(static_cast<const char*>(source) + i * sizeof(WordPart));
    }
    return words;
  }
  // Of eight words in registers: a load of words just stored would wait for all earlier stores.
  static KVLINK_INLINE Words of(const uint64_t (&w)[8]) {
#if defined(__AVX512F__)
    return {{(WordPart)_mm512_set_epi64(w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0])}};
#elif defined(__AVX2__)
    return {{WordPart{w[0], w[1], w[2], w[3]}, WordPart{w[4], w[5], w[6], w[7]}}};
#else
    return {
        {WordPart{w[0], w[1]}, WordPart{w[2], w[3]}, WordPart{w[4], w[5]}, WordPart{w[6], w[7]}}};
#endif
  }
  KVLINK_INLINE void store(void* target) const {
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) {
      store_unaligned(static_cast<char*>(target) + i * sizeof(WordPart), part[i]);
    }
  }
  // The first `num_bytes` < 64, zeros after them; nothing past them is touched.
  static KVLINK_INLINE Words load_some(const void* source, int64_t num_bytes) {
#if defined(__AVX512F__)
    return {{(WordPart)_mm512_maskz_loadu_epi8(first_bytes(num_bytes), source)}};
#else
    char padded[64] = {};
    std::memcpy(padded, source, static_cast<size_t>(num_bytes));
    return load(padded);
#endif
  }
  KVLINK_INLINE void store_some(void* target, int64_t num_bytes) const {
#if defined(__AVX512F__)
    _mm512_mask_storeu_epi8(target, first_bytes(num_bytes), (__m512i)part[0]);
#else
    char padded[64];
    store(padded);
    std::memcpy(target, padded, static_cast<size_t>(num_bytes));
#endif
  }
  // Around the caches, to a multiple of 64 bytes; ordered with other stores by finish_streams().
  KVLINK_INLINE void stream(void* target) const {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)target, (__m512i)part[0]);
#elif defined(__AVX2__)
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) {
      _mm256_stream_si256((__m256i*)target + i, (__m256i)part[i]);
    }
#else
    store(target);
#endif
  }

#if defined(__AVX512F__)
 private:
  static KVLINK_INLINE __mmask64 first_bytes(int64_t count) { return (uint64_t{1} << count) - 1; }
#endif
};

// What was streamed is seen by whoever sees a later store of this thread.
KVLINK_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// low32(x) * high32(x) of every word.
KVLINK_INLINE WordPart multiply_halves(WordPart x) {
#if defined(__AVX512F__)
  return (WordPart)_mm512_mul_epu32((__m512i)x, (__m512i)(x >> 32));
#elif defined(__AVX2__)
  return (WordPart)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32));
#else
  return (x & 0xffffffffu) * (x >> 32);
#endif
}

// Words 2i and 2i + 1 exchanged.
KVLINK_INLINE WordPart exchange_neighbours(WordPart x) {
#if defined(__AVX512F__)
  return (WordPart)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_BADC);
#elif defined(__AVX2__)
  return (WordPart)_mm256_shuffle_epi32((__m256i)x, 0x4e);
#else
  return __builtin_shufflevector(x, x, 1, 0);
#endif
}

alignas(64) inline constexpr uint64_t kFirstKeys[8] = {
    row_digest::key(0), row_digest::key(1), row_digest::key(2), row_digest::key(3),
    row_digest::key(4), row_digest::key(5), row_digest::key(6), row_digest::key(7)};

// What the stripes of one row add to its lanes. The sums of words reach their lanes at the end.
class LaneSums {
 public:
  KVLINK_INLINE void add(const Words& words, const Words& keys) {
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) {
      products_.part[i] += multiply_halves(words.part[i] ^ keys.part[i]);
      words_.part[i] += words.part[i];
    }
  }
  KVLINK_INLINE Words acc() const {
    Words acc;
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) {
      acc.part[i] = products_.part[i] + exchange_neighbours(words_.part[i]);
    }
    return acc;
  }

 private:
  Words products_ = Words::zero(), words_ = Words::zero();
};

// The lanes of one row, stripe by stripe.
class RowLanes {
 public:
  KVLINK_INLINE RowLanes() : keys_(Words::load(kFirstKeys)) {}

  KVLINK_INLINE void stripe(const Words& words) {
    sums_.add(words, keys_);
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) keys_.part[i] += row_digest::kStep;
  }
  // Whole stripes, except in the last call for a row.
  KVLINK_INLINE void bytes(const char* data, int64_t num_bytes) {
    int64_t i = 0;
    for (; i + 64 <= num_bytes; i += 64) stripe(Words::load(data + i));
    if (i < num_bytes) stripe(Words::load_some(data + i, num_bytes - i));
  }
  KVLINK_INLINE Words acc() const { return sums_.acc(); }

 private:
  LaneSums sums_;
  Words keys_;
};

// The digests of many rows, kept apart by lane until the end.
class DigestSum {
 public:
  KVLINK_INLINE void add_row(const Words& acc, const Words& start, uint64_t shift) {
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) {
      WordPart x = acc.part[i] ^ (start.part[i] + shift);
      x ^= x >> 30;
      x *= 0xbf58476d1ce4e5b9;
      x ^= x >> 27;
      x *= 0x94d049bb133111eb;
      sum_.part[i] += x ^ (x >> 31);
    }
  }
  KVLINK_INLINE void add(const DigestSum& other) {
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) sum_.part[i] += other.sum_.part[i];
  }
  uint64_t total() const {
    uint64_t lanes[8], sum = 0;
    sum_.store(lanes);
    for (const uint64_t lane : lanes) sum += lane;
    return sum;
  }

 private:
  Words sum_ = Words::zero();
};

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
