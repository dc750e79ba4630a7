// Memory is asked for in the order of its addresses, however it is read: rows of K are read a head
// at a time, many rows at once, while the fetching goes from row to row, a stretch ahead. Included
// by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

// The rows of a block that a pass reads, in the order in which they are fetched: kGroupRows rows,
// of each as many heads as follow each other in memory (up to kMaxRunBytes), then the next heads.
struct RowStream {
  static constexpr int64_t kGroupRows = 16;
  static constexpr int64_t kMaxRunBytes = 16384;  // so that a group stays in the caches

  const char* const* rows = nullptr;  // [num_rows], from the first group on
  int64_t first = 0, num_rows = 0;    // rows before `first` are not read
  int64_t head_bytes = 0, stride_head = 0, num_heads = 0;

  int64_t run_heads() const {
    if (stride_head != head_bytes || head_bytes > kMaxRunBytes) return 1;
    const int64_t most = kMaxRunBytes / head_bytes;
    return most < num_heads ? most : num_heads;
  }
  int64_t group_lines() const { return kGroupRows * run_heads() * head_bytes / 64; }
};

class ReadAhead {
 public:
  // A pass over `stream` begins, of which nothing has been fetched: fetches as much as stays ahead.
  void begin(const RowStream& stream) {
    enter(stream);
    fetch(stream.group_lines());
  }

  // A pass begins, over what was announced last; `next` is what the pass after it will read.
  void announce(const RowStream& next) {
    if (follow_.num_rows > 0) enter(follow_);  // not even begun
    follow_ = next;
    if (at_ >= end_) go_on();
  }

  template <int kLines>
  KVLINK_INLINE void fetch() {
    const char* at = at_;
    if (end_ - at < kLines * 64) return fetch(kLines);
    KVLINK_UNROLL
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at + i * 64);
    at_ = at + kLines * 64;
  }

  __attribute__((noinline)) void fetch(int64_t num_lines) {
    for (; num_lines > 0; --num_lines) {
      if (at_ >= end_) go_on();
      if (at_ >= end_) return;
      __builtin_prefetch(at_);
      at_ += 64;
    }
  }

 private:
  void enter(const RowStream& stream) {
    now_ = stream;
    run_heads_ = stream.run_heads();
    group_ = stream.first / RowStream::kGroupRows * RowStream::kGroupRows;
    row_ = stream.first;
    head_ = 0;
    at_ = end_ = nullptr;
    if (row_ < now_.num_rows) find_run();
  }

  void find_run() {
    const int64_t heads = now_.num_heads - head_ < run_heads_ ? now_.num_heads - head_ : run_heads_;
    at_ = now_.rows[row_] + head_ * now_.stride_head;
    end_ = at_ + heads * now_.head_bytes;
  }

  void go_on() {
    at_ = end_;
    if (row_ < now_.num_rows) ++row_;
    if (row_ >= now_.num_rows || row_ >= group_ + RowStream::kGroupRows) {
      head_ += run_heads_;
      if (head_ >= now_.num_heads) {
        head_ = 0;
        group_ += RowStream::kGroupRows;
      }
      row_ = group_ > now_.first ? group_ : now_.first;
    }
    if (row_ < now_.num_rows) return find_run();
    if (follow_.num_rows == 0) return;  // until the next pass begins
    const RowStream next = follow_;
    follow_.num_rows = 0;
    enter(next);
  }

  RowStream now_, follow_;
  int64_t run_heads_ = 1, group_ = 0, row_ = 0, head_ = 0;
  const char* at_ = nullptr;  // to be fetched next, of a run that ends at end_
  const char* end_ = nullptr;
};

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
