// Scales of rows on their way to memory. A store that misses the caches holds up all that follow
// it; so those that lie side by side are kept until they are a whole line, which goes around the
// caches as the rows do. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/row_walk.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

class ScaleLines {
 public:
  // The scale of a row of `head`, of which one line is kept.
  KVLINK_INLINE void put(int64_t head, float* at, float scale) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at), begin = address & ~uintptr_t{63};
    Line& line = lines_[head];
    if (line.begin != begin) {
      store(line);
      line.begin = begin;
      line.filled = 0;
    }
    line.scales[address % 64 / 4] = scale;
    line.filled |= 1u << (address % 64 / 4);
  }

  // What is still kept of the first `num_heads` heads.
  void finish(int64_t num_heads) {
    for (int64_t i = 0; i < num_heads; ++i) store(lines_[i]);
  }

 private:
  struct Line {
    alignas(64) float scales[16];
    uintptr_t begin = 0;
    uint32_t filled = 0;  // bits of the scales that are there
  };

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
