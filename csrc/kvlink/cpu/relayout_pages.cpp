#include "kvlink/cpu/relayout_pages.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cpu {

namespace {

constexpr int64_t kStreamBytes = 16 << 20;

// Pages that the run touches, sorted.
std::vector<int32_t> used_pages(const TokenRun& run, int64_t num_tokens, int64_t page_size) {
  const int64_t first = run.first_slot / page_size;
  const int64_t last = (run.first_slot + num_tokens - 1) / page_size;
  std::vector<int32_t> pages(run.pages + first, run.pages + last + 1);
  std::sort(pages.begin(), pages.end());
  return pages;
}

// NOTE: this finds pages of one pool; pools that overlap in some other way are the caller's affair.
void check_overlap(const RelayoutParams& params) {
  const auto dst = used_pages(params.dst, params.num_tokens, params.dst_layers[0].layout.page_size);
  const auto twice = std::adjacent_find(dst.begin(), dst.end());
  KVLINK_CHECK(twice == dst.end(), "dst_pages: expected distinct pages; got ", *twice, " twice");
  bool same_pool = false;
  for (int32_t i = 0; i < params.num_layers; ++i) {
    for (int32_t j = 0; j < params.num_layers; ++j) {
      same_pool |= params.src_layers[i].k == params.dst_layers[j].k;
    }
  }
  if (!same_pool) return;
  const auto src = used_pages(params.src, params.num_tokens, params.src_layers[0].layout.page_size);
  for (const int32_t page : dst) {
    KVLINK_CHECK(!std::binary_search(src.begin(), src.end(), page),
                 "dst_pages: expected no source page of the same pool; got ", page);
  }
}

// Cuts the run where either side changes its page.
std::vector<RowBox> plan_boxes(const RelayoutParams& params, int64_t max_tokens) {
  const int64_t src_size = params.src_layers[0].layout.page_size;
  const int64_t dst_size = params.dst_layers[0].layout.page_size;
  std::vector<RowBox> boxes;
  for (int64_t token = 0; token < params.num_tokens;) {
    const int64_t src = params.src.first_slot + token, dst = params.dst.first_slot + token;
    const int64_t count = std::min({src_size - src % src_size, dst_size - dst % dst_size,
                                    max_tokens, params.num_tokens - token});
    boxes.push_back({.src_page = params.src.pages[src / src_size],
                     .src_slot = src % src_size,
                     .dst_page = params.dst.pages[dst / dst_size],
                     .dst_slot = dst % dst_size,
                     .num_tokens = count,
                     .token_position = params.token_position + token});
    token += count;
  }
  return boxes;
}

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
  const std::vector<RowBox> boxes = plan_boxes(params, box_tokens(moves));
  const uint64_t digest = for_each_box(moves, boxes, KVLINK_SIMD_PICK(move_rows));
  return {.rows = static_cast<uint64_t>(params.num_tokens) * params.num_heads * moves.size(),
          .digest = digest};
}

}  // namespace kvlink::cpu
