// The rows of a stretch of boxes one after the other, and the fetching of those that come next.
// Included by *_simd.cpp only.
#pragma once

#include "kvlink/base/convert.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/words.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

inline constexpr int64_t kFetchBytes = 4096;   // ahead of what is read
inline constexpr int64_t kShortBytes = 16384;  // the CPU goes on by itself in longer boxes

// Asks for a line of each page of the address space that short boxes lie in, long before they are
// fetched, so that where the page lies has been looked up by then: on virtual machines that takes
// longer than a line does.
class PageTouches {
 public:
  PageTouches(const RowMove& move, const RowBox* boxes, int64_t num_boxes, bool of_dst)
      : move_(move), rows_(of_dst ? move.dst : move.src), of_dst_(of_dst), next_(boxes) {
    end_ = boxes + num_boxes;
    if (num_boxes == 0) return;
    const int64_t size = dtype_bytes(rows_.dtype);
    const auto reach = [size](int64_t count, int64_t stride) {
      const int64_t bytes = (count - 1) * stride * size;
      return bytes < 0 ? -bytes : bytes;
    };
    box_bytes_ = reach(boxes->num_tokens, rows_.at.stride_slot) +
                 reach(move.num_heads, rows_.at.stride_head) + move.dims * size;
    if (move.num_planes > 1) box_bytes_ += of_dst ? move.dst_plane_bytes : move.src_plane_bytes;
    if (box_bytes_ > kShortBytes) next_ = end_;
    num_ahead_ = kAheadBytes / (box_bytes_ < kPageBytes ? kPageBytes : box_bytes_);
  }

  // `box` is about to be fetched.
  KVLINK_INLINE void before(const RowBox* box) {
    while (next_ < end_ && next_ - box <= num_ahead_) touch(*next_++);
  }

 private:
  static constexpr int64_t kPageBytes = 4096;
  static constexpr int64_t kAheadBytes = 12 * kPageBytes;

  KVLINK_INLINE void touch(const RowBox& box) {
    const char* at = of_dst_ ? rows_.row(box.dst_page, box.dst_slot, move_.dst_head)
                             : rows_.row(box.src_page, box.src_slot, move_.src_head);
    for (int64_t i = 0; i < box_bytes_; i += kPageBytes) __builtin_prefetch(at + i, 0, 2);
  }

  const RowMove& move_;
  const RowPlane& rows_;
  const bool of_dst_;
  const RowBox* next_;  // to be touched
  const RowBox* end_;
  int64_t box_bytes_ = 0;  // from the first to the last that is read
  int64_t num_ahead_ = 0;
};

// Goes through runs of bytes: rows, or with kMerged what consecutive rows make on both sides. Each
// box in the order of the destination's addresses, tokens outside heads or inside; in the order of
// the source's where stores go around the caches: those may jump, while reads that do are late.
template <bool kMerged>
class RowWalk {
 public:
  // With `of_dst` there is no source: both addresses are those of the destination.
  KVLINK_INLINE RowWalk(const RowMove& move, const RowBox* boxes, int64_t num_boxes, bool of_dst)
      : move_(&move), from_(of_dst ? &move.dst : &move.src), box_(boxes), end_(boxes + num_boxes) {
    of_dst_ = of_dst;
    const Plane& order = move.streaming ? from_->at : move.dst.at;
    heads_inside_ = move.num_heads > 1 && order.stride_head < order.stride_slot;
    row_bytes_ = move.dims * dtype_bytes(move.dst.dtype);
    src_row_bytes_ = move.dims * dtype_bytes(from_->dtype);
    enter_box();
  }

  // For a walk that has not gone anywhere yet.
  PageTouches touches() const { return {*move_, box_, end_ - box_, of_dst_}; }

  KVLINK_INLINE bool done() const { return box_ == end_; }
  KVLINK_INLINE const char* src() const { return src_; }
  KVLINK_INLINE char* dst() const { return dst_; }
  KVLINK_INLINE int64_t dst_bytes() const { return run_bytes_; }
  KVLINK_INLINE int64_t src_bytes() const { return kMerged ? run_bytes_ : src_row_bytes_; }
  KVLINK_INLINE int32_t plane() const { return plane_; }  // of the move's
  // Of rows, so without kMerged.
  KVLINK_INLINE const RowBox& box() const { return *box_; }
  KVLINK_INLINE int64_t token() const { return heads_inside_ ? outer_ : inner_; }
  KVLINK_INLINE int64_t head() const { return heads_inside_ ? inner_ : outer_; }

  KVLINK_INLINE void next() { skip(1); }

  // Rows that follow each other by one step on either side, the walk's place the first of them:
  // what next() goes through without going on to another token or head outside.
  KVLINK_INLINE bool heads_inside() const { return heads_inside_; }
  KVLINK_INLINE int64_t line_rows() const { return num_inner_ - inner_; }
  KVLINK_INLINE int64_t src_step() const { return src_inner_; }
  KVLINK_INLINE int64_t dst_step() const { return dst_inner_; }
  // Such lines that follow each other by one step, one if the walk is inside it.
  KVLINK_INLINE int64_t lines() const { return inner_ == 0 ? num_outer_ - outer_ : 1; }
  KVLINK_INLINE int64_t src_line_step() const { return src_outer_; }
  KVLINK_INLINE int64_t dst_line_step() const { return dst_outer_; }
  // Past whole lines; lines() at most, from the beginning of one.
  KVLINK_INLINE void skip_lines(int64_t num_lines) {
    outer_ += num_lines;
    if (outer_ < num_outer_) {
      src_ = src_outer_begin_ += num_lines * src_outer_;
      dst_ = dst_outer_begin_ += num_lines * dst_outer_;
      return;
    }
    next_plane();
  }
  // As many times next(); line_rows() at most.
  KVLINK_INLINE void skip(int64_t num_rows) {
    inner_ += num_rows;
    if (inner_ < num_inner_) {
      src_ += num_rows * src_inner_;
      dst_ += num_rows * dst_inner_;
      return;
    }
    inner_ = 0;
    if (++outer_ < num_outer_) {
      src_ = src_outer_begin_ += src_outer_;
      dst_ = dst_outer_begin_ += dst_outer_;
      return;
    }
    next_plane();
  }

 private:
  KVLINK_INLINE void next_plane() {
    if (++plane_ == move_->num_planes) {
      plane_ = 0;
      ++box_;
    }
    enter_box();
  }

  KVLINK_INLINE void enter_box() {
    if (box_ == end_) return;
    if (box_->num_tokens != num_tokens_) shape(box_->num_tokens);
    outer_ = inner_ = 0;
    dst_ = dst_outer_begin_ = move_->dst.row(box_->dst_page, box_->dst_slot, move_->dst_head) +
                              plane_ * move_->dst_plane_bytes;
    src_ = src_outer_begin_ = of_dst_
                                  ? dst_
                                  : from_->row(box_->src_page, box_->src_slot, move_->src_head) +
                                        plane_ * move_->src_plane_bytes;
  }

  void shape(int64_t num_tokens) {
    num_tokens_ = num_tokens;
    const int64_t src_size = dtype_bytes(from_->dtype), dst_size = dtype_bytes(move_->dst.dtype);
    const int64_t src_slot = from_->at.stride_slot * src_size;
    const int64_t dst_slot = move_->dst.at.stride_slot * dst_size;
    const int64_t src_head = from_->at.stride_head * src_size;
    const int64_t dst_head = move_->dst.at.stride_head * dst_size;
    num_outer_ = heads_inside_ ? num_tokens : move_->num_heads;
    num_inner_ = heads_inside_ ? move_->num_heads : num_tokens;
    src_outer_ = heads_inside_ ? src_slot : src_head;
    dst_outer_ = heads_inside_ ? dst_slot : dst_head;
    src_inner_ = heads_inside_ ? src_head : src_slot;
    dst_inner_ = heads_inside_ ? dst_head : dst_slot;
    run_bytes_ = row_bytes_;
    if (!kMerged) return;
    for (int i = 0; i < 2; ++i) {
      const bool continues = src_inner_ == run_bytes_ && dst_inner_ == run_bytes_;
      if (num_inner_ != 1 && !continues) return;
      run_bytes_ *= num_inner_;
      num_inner_ = num_outer_;
      src_inner_ = src_outer_;
      dst_inner_ = dst_outer_;
      num_outer_ = 1;
    }
  }

  const RowMove* move_;
  const RowPlane* from_;
  const RowBox* box_;
  const RowBox* end_;
  bool of_dst_, heads_inside_;
  int32_t plane_ = 0;
  int64_t row_bytes_, src_row_bytes_, run_bytes_ = 0, num_tokens_ = -1;
  int64_t num_outer_ = 0, num_inner_ = 0, outer_ = 0, inner_ = 0;
  int64_t src_outer_ = 0, src_inner_ = 0, dst_outer_ = 0, dst_inner_ = 0;
  const char* src_ = nullptr;
  const char* src_outer_begin_ = nullptr;
  char* dst_ = nullptr;
  char* dst_outer_begin_ = nullptr;
};

// Fetches what a walk will read, kFetchBytes before it does: runs are too short, and too scattered,
// for the CPU to see where they go.
template <bool kMerged>
class FetchAhead {
 public:
  KVLINK_INLINE explicit FetchAhead(const RowWalk<kMerged>& walk)
      : walk_(walk), touches_(walk.touches()) {
    enter_line();
    at_ = begin_;
    end_ = begin_ + num_bytes_;
    bytes(kFetchBytes);
  }

  KVLINK_INLINE void stripe() {
    __builtin_prefetch(at_);
    at_ += row_digest::kStripeBytes;
    if (at_ >= end_) next_run();
  }
  KVLINK_INLINE void bytes(int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += row_digest::kStripeBytes) stripe();
  }
  // A whole run of kStripes stripes; for callers that go by such runs alone.
  template <int kStripes>
  KVLINK_INLINE void stripes() {
    KVLINK_UNROLL
    for (int i = 0; i < kStripes; ++i) __builtin_prefetch(at_ + i * row_digest::kStripeBytes);
    next_run();
  }

 private:
  KVLINK_INLINE void next_run() {
    begin_ += step_;
    if (--left_ == 0) enter_line();
    at_ = begin_;
    end_ = begin_ + num_bytes_;
  }
  // Past the last run it stays there.
  __attribute__((noinline)) void enter_line() {
    if (walk_.done()) {
      begin_ -= step_;
      step_ = 0;
      left_ = INT64_MAX;
      return;
    }
    touches_.before(&walk_.box());
    begin_ = walk_.src();
    num_bytes_ = walk_.src_bytes();
    step_ = walk_.src_step();
    left_ = walk_.line_rows();
    walk_.skip(left_);
  }

  RowWalk<kMerged> walk_;  // past the line of runs that is being fetched
  PageTouches touches_;
  const char* at_ = nullptr;  // to be fetched next, of a run from begin_ to end_
  const char* end_ = nullptr;
  const char* begin_ = nullptr;
  int64_t num_bytes_ = 0, step_ = 0, left_ = 0;  // of the runs of the line; those left of it
};

// What each head of a move begins its digests with, kHeads of them at most, in both planes.
class HeadStarts {
 public:
  static constexpr int32_t kHeads = 64;

  explicit HeadStarts(const RowMove& move) {
    const int64_t row_bytes = move.dims * dtype_bytes(move.dst.dtype);
    for (int32_t plane = 0; plane < move.num_planes; ++plane) {
      for (int32_t i = 0; i < move.num_heads; ++i) {
        const uint64_t base = row_digest::base(move.model_layer, move.model_head + i,
                                               move.model_plane + plane, row_bytes);
        uint64_t start[8];
        for (int j = 0; j < 8; ++j) start[j] = row_digest::start(base, j);
        starts_[plane * kHeads + i] = Words::load(start);
      }
    }
  }
  const Words& operator[](int64_t head) const { return starts_[head]; }
  const Words& of(int32_t plane, int64_t head) const { return starts_[plane * kHeads + head]; }

 private:
  Words starts_[2 * kHeads];
};

// Applies `function` to kHeads heads of the move at a time, and adds up what it returns.
template <typename Function>
uint64_t for_each_heads(const RowMove& move, const Function& function) {
  uint64_t sum = 0;
  for (int32_t first = 0; first < move.num_heads; first += HeadStarts::kHeads) {
    const int32_t left = move.num_heads - first;
    RowMove part = move;
    part.num_heads = left < HeadStarts::kHeads ? left : HeadStarts::kHeads;
    part.src_head += first;
    part.dst_head += first;
    part.model_head += first;
    sum += function(part);
  }
  return sum;
}

// The part of a row's digest that tells its place and its own scale.
template <bool kMerged>
KVLINK_INLINE uint64_t digest_shift(const RowMove& move, const RowWalk<kMerged>& walk) {
  const RowBox& box = walk.box();
  const uint64_t shift = row_digest::shift(box.token_position + walk.token());
  if (!move.dst.token_scale) return shift;
  const float* scale =
      move.dst.row_scale(box.dst_page, box.dst_slot + walk.token(), move.dst_head + walk.head());
  return shift + row_digest::scale_shift(float_bits(*scale));
}

// Streaming stores take whole stripes at multiples of 64 bytes.
KVLINK_INLINE bool can_stream(const RowMove& move) {
  const RowPlane& dst = move.dst;
  const int64_t size = dtype_bytes(dst.dtype);
  const int64_t all = dst.at.stride_page | dst.at.stride_slot | dst.at.stride_head | move.dims;
  return move.streaming && dst.at.stride_dim == 1 && all * size % 64 == 0 &&
         reinterpret_cast<uintptr_t>(dst.data) % 64 == 0;
}

// Copies a run, whose digest lanes grow by it with kDigest.
template <bool kDigest, bool kMerged>
KVLINK_INLINE void copy_run(char* dst, const char* src, int64_t num_bytes, bool streaming,
                            FetchAhead<kMerged>& ahead, RowLanes& lanes) {
  int64_t i = 0;
  if (streaming) {
    for (; i + 64 <= num_bytes; i += 64) {
      ahead.stripe();
      const Words words = Words::load(src + i);
      words.stream(dst + i);
      if (kDigest) lanes.stripe(words);
    }
  } else {
    for (; i + 64 <= num_bytes; i += 64) {
      ahead.stripe();
      const Words words = Words::load(src + i);
      words.store(dst + i);
      if (kDigest) lanes.stripe(words);
    }
  }
  if (i == num_bytes) return;
  ahead.stripe();
  const Words words = Words::load_some(src + i, num_bytes - i);
  words.store_some(dst + i, num_bytes - i);
  if (kDigest) lanes.stripe(words);
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
