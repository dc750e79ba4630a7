#include "kvlink/cpu/relayout_pages.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kStreamBytes = 16 << 20;

// A bit for every page of a pool that the run touches.
class UsedPages {
 public:
  UsedPages(const TokenRun& run, int64_t num_tokens, const LayerView& layer)
      : words_(ceil_div(layer.num_pages, 64)) {
    first_ = run.pages + run.first_slot / layer.layout.page_size;
    last_ = run.pages + (run.first_slot + num_tokens - 1) / layer.layout.page_size;
  }
  bool has(int32_t page) const { return words_[page / 64] >> page % 64 & 1; }
  // The first page that is listed twice, -1 if there is none.
  int32_t add_all() {
    int32_t twice = -1;
    for (const int32_t* page = first_; page <= last_; ++page) {
      if (twice < 0 && has(*page)) twice = *page;
      words_[*page / 64] |= uint64_t{1} << *page % 64;
    }
    return twice;
  }
  const int32_t* begin() const { return first_; }
  const int32_t* end() const { return last_ + 1; }

 private:
  std::vector<uint64_t> words_;
  const int32_t* first_;
  const int32_t* last_;
};

// NOTE: this finds pages of one pool; pools that overlap in some other way are the caller's affair.
void check_overlap(const RelayoutParams& params) {
  UsedPages dst(params.dst, params.num_tokens, params.dst_layers[0]);
  const int32_t twice = dst.add_all();
  KVLINK_CHECK(twice < 0, "dst_pages: expected distinct pages; got ", twice, " twice");
  bool same_pool = false;
  for (int32_t i = 0; i < params.num_layers; ++i) {
    for (int32_t j = 0; j < params.num_layers; ++j) {
      same_pool |= params.src_layers[i].k == params.dst_layers[j].k;
    }
  }
  if (!same_pool) return;
  for (const int32_t page : UsedPages(params.src, params.num_tokens, params.src_layers[0])) {
    KVLINK_CHECK(page >= params.dst_layers[0].num_pages || !dst.has(page),
                 "dst_pages: expected no source page of the same pool; got ", page);
  }
}

// Whether the slots of a page continue those of the page before.
bool pages_join(const Plane& plane, int64_t page_size) {
  return plane.stride_page == page_size * plane.stride_slot;
}

bool pages_join(const RowPlane& rows, int64_t page_size) {
  return pages_join(rows.at, page_size) && (!rows.scale || pages_join(rows.scale_at, page_size));
}

// A place in a run.
struct Cursor {
  Cursor(const TokenRun& run, int64_t token, int64_t size)
      : page(run.pages + (run.first_slot + token) / size),
        slot((run.first_slot + token) % size),
        page_size(size) {}

  int64_t left() const { return page_size - slot; }  // tokens in this page
  void skip(int64_t count) {                         // no more than are left
    slot += count;
    if (slot < page_size) return;
    slot = 0;
    ++page;
  }
  // Whether this is the slot that comes `slots` after the first one of `from`.
  bool follows(int64_t from, int64_t slots, bool joins) const {
    return (joins || *page == from) && (*page - from) * page_size + slot == slots;
  }

  const int32_t* page;
  int64_t slot, page_size;
};

// Cuts a run where either side changes its page, unless both sides go on as if it did not.
class RunCutter {
 public:
  RunCutter(const RelayoutParams& params, const std::vector<RowMove>& moves)
      : params_(params),
        max_tokens_(box_tokens(moves)),
        src_size_(params.src_layers[0].layout.page_size),
        dst_size_(params.dst_layers[0].layout.page_size) {
    for (const RowMove& move : moves) {
      src_joins_ = src_joins_ && pages_join(move.src, src_size_);
      dst_joins_ = dst_joins_ && pages_join(move.dst, dst_size_);
    }
  }

  // NOTE: a few divisions for a box would take as long as the copy of one of 2 KiB.
  void operator()(int64_t first, int64_t num_tokens, std::vector<RowBox>& boxes) const {
    Cursor src(params_.src, first, src_size_), dst(params_.dst, first, dst_size_);
    for (int64_t token = first, end = first + num_tokens; token < end;) {
      const int64_t count = std::min({src.left(), dst.left(), max_tokens_, end - token});
      const auto continues = [&](const RowBox& last) {
        return src.follows(last.src_page, last.src_slot + last.num_tokens, src_joins_) &&
               dst.follows(last.dst_page, last.dst_slot + last.num_tokens, dst_joins_) &&
               last.num_tokens + count <= max_tokens_;
      };
      if (!boxes.empty() && continues(boxes.back())) {
        boxes.back().num_tokens += count;
      } else {
        boxes.push_back({.src_page = *src.page,
                         .src_slot = src.slot,
                         .dst_page = *dst.page,
                         .dst_slot = dst.slot,
                         .num_tokens = count,
                         .token_position = params_.token_position + token});
      }
      token += count;
      src.skip(count);
      dst.skip(count);
    }
  }

 private:
  const RelayoutParams& params_;
  int64_t max_tokens_, src_size_, dst_size_;
  bool src_joins_ = true, dst_joins_ = true;
};

// What does not stay in the caches anyway should not pass through them: its lines would be read
// before they are written, and push out others.
bool streams(const RelayoutParams& params, const std::vector<RowMove>& moves) {
  int64_t num_bytes = 0;
  for (const RowMove& move : moves) num_bytes += params.num_tokens * token_bytes(move);
  return std::max(num_bytes, params.whole_bytes) >= kStreamBytes;
}

}  // namespace

RelayoutResult relayout_pages(const RelayoutParams& params) {
  std::vector<RowMove> moves = plan_moves(params);
  check_run(params.src, params.num_tokens, params.src_layers[0], "src_pages");
  check_run(params.dst, params.num_tokens, params.dst_layers[0], "dst_pages");
  if (params.num_tokens == 0) return {};
  check_overlap(params);
  const bool streaming = streams(params, moves);
  for (RowMove& move : moves) {
    move.verbatim = moves_verbatim(move);
    move.streaming = streaming;
  }
  const uint64_t num_planes = moves.size();
  moves = join_planes(moves);
  const uint64_t digest =
      for_each_box(moves, params.num_tokens, RunCutter(params, moves), KVLINK_SIMD_PICK(move_rows));
  return {.rows = static_cast<uint64_t>(params.num_tokens) * params.num_heads * num_planes,
          .digest = digest};
}

}  // namespace kvlink::cpu
