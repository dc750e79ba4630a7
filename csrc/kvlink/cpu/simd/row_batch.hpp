// The rows of a walk, a few at a time. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/row_walk.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// A row, or what it takes from one row to another: then addresses are differences of bytes.
struct alignas(64) RowAt {
  const char* src = nullptr;
  char* dst = nullptr;
  const float* src_scale = nullptr;  // of the row's own, as the next
  float* dst_scale = nullptr;
  int64_t head = 0;
  uint64_t shift = 0;  // of the digest, the scale left out
  int64_t unused[2] = {};
};
static_assert(sizeof(RowAt) == 64);

// Rows that are taken through one step after the other, so that the CPU always has as many of them
// under way as a step's latency asks for. Sixteen at once are slower, where rows lie apart by half.
struct Rows {
  static constexpr int64_t kMost = 8;

  int64_t count = 0;
  int64_t scales = 0;  // where Converter has those of the rows' own
  // Where not 0: row i is of the same head as row i % num_heads, and i / num_heads tokens later.
  int64_t num_heads = 0;
  RowAt at[kMost];
};

// The rows of a stretch of boxes, batch by batch.
class RowBatches {
 public:
  RowBatches(const RowMove& move, const RowBox* boxes, int64_t num_boxes)
      : move_(move), walk_(move, boxes, num_boxes, false) {
    const bool heads = walk_.heads_inside();
    const uint64_t steps[2][2] = {{bytes(walk_.src_step()), bytes(walk_.dst_step())},
                                  {bytes(walk_.src_line_step()), bytes(walk_.dst_line_step())}};
    for (int i = 0; i < 2; ++i) {
      const bool is_head = heads == (i == 0);
      const auto scale_step = [&](const RowPlane& plane) {
        if (!plane.token_scale) return uint64_t{0};
        return bytes(4 * (is_head ? plane.scale_at.stride_head : plane.scale_at.stride_slot));
      };
      const uint64_t step[8] = {steps[i][0],
                                steps[i][1],
                                scale_step(move.src),
                                scale_step(move.dst),
                                is_head ? uint64_t{1} : 0,
                                is_head ? 0 : row_digest::shift(1)};
      steps_[i] = Words::load(step);
    }
  }

  // The next rows, `most` at most; none at the end.
  __attribute__((noinline)) void take(Rows& rows, int64_t most) {
    int64_t count = 0;
    rows.num_heads = 0;
    while (count < most && !walk_.done()) {
      Words line = here();
      int64_t num_rows = walk_.line_rows(), num_lines = walk_.lines();
      const int64_t space = most - count;
      if (num_rows * 2 > space || num_lines == 1) {
        if (num_rows > space) num_rows = space;
        num_lines = 1;
        walk_.skip(num_rows);
      } else {
        while (num_lines * num_rows > space) num_lines >>= 1;
        walk_.skip_lines(num_lines);
      }
      if (walk_.heads_inside()) {
        rows.num_heads = count == 0 ? num_rows : 0;
      } else {
        rows.num_heads = count == 0 && num_lines == 1 ? 1 : 0;
      }
      for (; num_lines > 0; --num_lines) {
        Words row = line;
        for (const int64_t end = count + num_rows; count < end; ++count) {
          row.store(rows.at + count);
          add(row, steps_[0]);
        }
        add(line, steps_[1]);
      }
    }
    rows.count = count;
  }

 private:
  static uint64_t bytes(int64_t difference) { return static_cast<uint64_t>(difference); }
  static KVLINK_INLINE void add(Words& words, const Words& step) {
    KVLINK_UNROLL
    for (int i = 0; i < kWordParts; ++i) words.part[i] += step.part[i];
  }

  // A RowAt.
  KVLINK_INLINE Words here() const {
    const RowBox& box = walk_.box();
    const int64_t head = walk_.head(), token = walk_.token();
    const auto scale = [&](const RowPlane& plane, int64_t page, int64_t slot, int64_t first_head) {
      if (!plane.token_scale) return uint64_t{0};
      return address(plane.row_scale(page, slot + token, first_head + head));
    };
    return Words::of({address(walk_.src()), address(walk_.dst()),
                      scale(move_.src, box.src_page, box.src_slot, move_.src_head),
                      scale(move_.dst, box.dst_page, box.dst_slot, move_.dst_head),
                      static_cast<uint64_t>(head), row_digest::shift(box.token_position + token), 0,
                      0});
  }
  static KVLINK_INLINE uint64_t address(const void* at) { return reinterpret_cast<uint64_t>(at); }

  const RowMove& move_;
  RowWalk<false> walk_;
  Words steps_[2];  // from row to row of a line, from line to line
};

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
