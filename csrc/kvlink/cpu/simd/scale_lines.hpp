// Scales of rows on their way to memory. A store that misses the caches holds up all that follow
// it; so those that lie side by side are kept until they are a whole line, which goes around the
// caches as the rows do. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/row_batch.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

class ScaleLines {
 public:
  // Before the first row; heads are numbered from 0.
  void start(int64_t num_heads) {
    for (int64_t i = 0; i < num_heads; ++i) lines_[i].begin = lines_[i].filled = 0;
  }

  // Scales of the rows, Rows::kMost of them to be read.
  KVLINK_INLINE void put(const Rows& rows, const float* scales) {
#if defined(__AVX512F__)
    if (rows.count == Rows::kMost && put_by_heads(rows, _mm256_loadu_ps(scales))) return;
#endif
    for (int64_t i = 0; i < rows.count; ++i) {
      Line& line = open(rows.at[i]);
      line.scales[place(rows.at[i])] = scales[i];
      line.filled |= 1u << place(rows.at[i]);
    }
  }

  // What is still kept of the first `num_heads` heads.
  void finish(int64_t num_heads) {
    for (int64_t i = 0; i < num_heads; ++i) store(lines_[i]);
  }

 private:
  struct alignas(64) Line {
    float scales[16];
    uintptr_t begin;
    uint32_t filled;  // bits of the scales that are there
  };

  static KVLINK_INLINE int64_t place(const RowAt& row) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row.dst_scale) % 64 / 4);
  }

  // The line of the row's scale; of each head one is kept.
  KVLINK_INLINE Line& open(const RowAt& row) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(row.dst_scale) & ~uintptr_t{63};
    Line& line = lines_[row.head];
    if (line.begin != begin) {
      store(line);
      line.begin = begin;
      line.filled = 0;
    }
    return line;
  }

#if defined(__AVX512F__)
  // Those of a few heads, each of tokens one after the other; false where a line ends among them.
  KVLINK_INLINE bool put_by_heads(const Rows& rows, __m256 scales) {
    if (rows.num_heads != 1 && rows.num_heads != 2 && rows.num_heads != 4) return false;
    const int64_t num_tokens = Rows::kMost / rows.num_heads;
    const uint32_t first = (1u << num_tokens) - 1;
    for (int64_t i = 0; i < rows.num_heads; ++i) {
      if (place(rows.at[i]) + num_tokens > 16) return false;
    }
    const uint32_t of_head = rows.num_heads == 1 ? 0xff : rows.num_heads == 2 ? 0x55 : 0x11;
    for (int64_t i = 0; i < rows.num_heads; ++i) {
      Line& line = open(rows.at[i]);
      const __m256 own = _mm256_maskz_compress_ps(static_cast<__mmask8>(of_head << i), scales);
      float* target = line.scales + place(rows.at[i]);
      if (num_tokens == 8) {
        _mm256_storeu_ps(target, own);
      } else if (num_tokens == 4) {
        _mm_storeu_ps(target, _mm256_castps256_ps128(own));
      } else {
        _mm_storel_pi(reinterpret_cast<__m64*>(target), _mm256_castps256_ps128(own));
      }
      line.filled |= first << place(rows.at[i]);
    }
    return true;
  }
#endif

  static KVLINK_INLINE void store(const Line& line) {
    float* target = reinterpret_cast<float*>(line.begin);
    if (line.filled == 0xffff) {
      Words::load(line.scales).stream(target);
    } else {
      for (uint32_t left = line.filled; left != 0; left &= left - 1) {
        target[__builtin_ctz(left)] = line.scales[__builtin_ctz(left)];
      }
    }
  }

  Line lines_[HeadStarts::kHeads];
};

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
