// Memory is asked for in the order of its addresses, however it is read: rows of K are read a head
// at a time, many rows at once, while the fetching goes from row to row, a stretch ahead. Included
// by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// The rows of a block that a pass reads, in the order in which they are fetched: `step` rows, of
// each as many heads as follow each other in memory (up to kMaxRunBytes), then the next heads.
struct RowStream {
  static constexpr int64_t kMaxRunBytes = 4096;
  // What is being read, and as much that is being fetched, share the nearest cache with what they
  // are multiplied with.
  static constexpr int64_t kStepBytes = 16384;
  // What follows itself in memory for longer, the CPU fetches by itself, and better.
  static constexpr int64_t kMaxFetchedBytes = 8192;

  // Of the steps 4, 8 and 16, the longest that fits.
  static int64_t step_of(int64_t row_bytes) {
    const int64_t run = row_bytes < kMaxRunBytes ? row_bytes : kMaxRunBytes;
    return run * 16 <= kStepBytes ? 16 : run * 8 <= kStepBytes ? 8 : 4;
  }

  const char* const* rows = nullptr;  // [num_rows], from the first step on
  int64_t step = 16;
  int64_t first = 0, num_rows = 0;  // rows before `first` are not read
  int64_t head_bytes = 0, stride_head = 0, num_heads = 0;

  int64_t run_heads() const {
    if (stride_head != head_bytes || head_bytes > kMaxRunBytes) return 1;
    const int64_t most = kMaxRunBytes / head_bytes;
    return most < num_heads ? most : num_heads;
  }
  bool is_fetched() const {
    return stride_head != head_bytes || num_heads * head_bytes <= kMaxFetchedBytes;
  }
  int64_t step_lines() const { return step * run_heads() * head_bytes / 64; }
};

class ReadAhead {
 public:
  // A pass over `stream` begins, of which nothing has been fetched: fetches as much as stays ahead,
  // a step of it or of the pass after it.
  void begin(const RowStream& stream, const RowStream& after) {
    for (int64_t i = 0; i < kTouchedRows && i < stream.num_rows; ++i) touch(stream.rows[i]);
    enter(stream);
    early_ = 0;
    const int64_t lines = stream.step_lines(), lines_after = after.step_lines();
    fetch(lines > lines_after ? lines : lines_after);
  }

  // A pass begins, over what was announced last; `next` is what the pass after it will read.
  void announce(const RowStream& next) {
    if (follow_.num_rows > 0) enter(follow_);  // not even begun
    follow_ = next;
    if (at_ >= end_) go_on();
  }

  // As many lines as are about to be read. All at once: between the loads of a block, they would
  // keep them waiting.
  KVLINK_INLINE void fetch(int64_t num_lines) {
    if (!is_fetched_) return;
    if (early_ > 0) {
      const int64_t spared = early_ < num_lines / 2 ? early_ : num_lines / 2;
      early_ -= spared;
      num_lines -= spared;
    }
    while (num_lines > 0) {
      if (at_ >= end_) go_on();
      if (at_ >= end_) return;
      const char* end = end_ - at_ < num_lines * 64 ? end_ : at_ + num_lines * 64;
      num_lines -= (end - at_ + 63) / 64;
      const char* at = at_;  // a register
      for (; at < end; at += 64) __builtin_prefetch(at);
      at_ = at;
    }
  }

  // Some while nothing is being read; fewer follow.
  void fetch_early(int64_t num_lines) {
    fetch(num_lines);
    early_ += num_lines;
  }

 private:
  void enter(const RowStream& stream) {
    now_ = stream;
    run_heads_ = stream.run_heads();
    is_fetched_ = stream.is_fetched();
    group_ = stream.first / stream.step * stream.step;
    row_ = stream.first;
    head_ = 0;
    at_ = end_ = nullptr;
    if (row_ < now_.num_rows) find_run();
  }

  // A line of each page of the address space, long before the others, so that where the page lies
  // has been looked up by then.
  void touch(const char* at) {
    if ((reinterpret_cast<uintptr_t>(at) ^ reinterpret_cast<uintptr_t>(touched_)) / 4096 == 0)
      return;
    touched_ = at;
    __builtin_prefetch(at, 0, 2);
  }

  void touch_row(int64_t row) {
    const int64_t after = row - now_.num_rows;
    if (after < 0) touch(now_.rows[row] + head_ * now_.stride_head);
    if (after >= 0 && after < follow_.num_rows) {
      touch(follow_.rows[after] + head_ * follow_.stride_head);
    }
  }

  void find_run() {
    touch_row(row_ + kTouchedRows);
    const int64_t heads = now_.num_heads - head_ < run_heads_ ? now_.num_heads - head_ : run_heads_;
    at_ = now_.rows[row_] + head_ * now_.stride_head;
    end_ = at_ + heads * now_.head_bytes;
  }

  __attribute__((noinline)) void go_on() {
    at_ = end_;
    if (row_ < now_.num_rows) ++row_;
    if (row_ >= now_.num_rows || row_ >= group_ + now_.step) {
      head_ += run_heads_;
      if (head_ >= now_.num_heads) {
        head_ = 0;
        group_ += now_.step;
      }
      row_ = group_ > now_.first ? group_ : now_.first;
    }
    if (row_ < now_.num_rows) return find_run();
    if (follow_.num_rows == 0) return;  // until the next pass begins
    const RowStream next = follow_;
    follow_.num_rows = 0;
    enter(next);
  }

  static constexpr int64_t kTouchedRows = 32;

  RowStream now_, follow_;
  bool is_fetched_ = true;
  int64_t run_heads_ = 1, group_ = 0, row_ = 0, head_ = 0;
  int64_t early_ = 0;         // lines fetched early, for which others come later
  const char* at_ = nullptr;  // to be fetched next, of a run that ends at end_
  const char* end_ = nullptr;
  const char* touched_ = nullptr;
};

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
