// Moving rows between planes: what append_kv, relayout_pages and digest_pages share.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kvlink/base/simd_level.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::cpu {

// num_tokens tokens, in consecutive slots of one page on either side, or of pages that continue
// each other: slots past the page's end are then as far on as their number tells.
struct RowBox {
  int64_t src_page = 0, src_slot = 0;
  int64_t dst_page = 0, dst_slot = 0;
  int64_t num_tokens = 0;
  int64_t token_position = 0;  // of the first; enters the digest
};

// Each applies one move to a stretch of boxes and returns the sum of the destination's row digests,
// 0 unless asked for one. convert_rows is the part of move_rows for rows that are not verbatim.
using RowFunction = uint64_t(const RowMove& move, const RowBox* boxes, int64_t num_boxes);
KVLINK_SIMD_DECLARE(RowFunction move_rows; RowFunction convert_rows; RowFunction digest_rows;)

// What a token brings to the destination, scales left out.
int64_t token_bytes(const RowMove& move);

// Same type and same scales: stored bytes mean the same on both sides.
bool moves_verbatim(const RowMove& move);

// Makes one move of K and V of each layer if in all of them they lie in the same pages, in the same
// order, and neither is converted: what lies side by side is then read in one go.
std::vector<RowMove> join_planes(const std::vector<RowMove>& moves);

// Throws InvalidArgument when the run does not lie in its pages, PageTableError when one of the
// entries it uses names no page of the pool. `name` is the argument the pages came in.
void check_run(const TokenRun& run, int64_t num_tokens, const LayerView& layer, const char* name);

// Most tokens in a box, so that a box is work worth a task of its own at most.
int64_t box_tokens(const std::vector<RowMove>& moves);

// Appends the boxes of tokens first .. first + count - 1 of what is moved; called on any thread.
using BoxPlanner = std::function<void(int64_t first, int64_t count, std::vector<RowBox>& boxes)>;

// Applies `function` to every move and all boxes of `num_tokens` tokens on the thread pool; the sum
// of what it returns.
uint64_t for_each_box(const std::vector<RowMove>& moves, int64_t num_tokens,
                      const BoxPlanner& planner, const std::function<RowFunction>& function);

}  // namespace kvlink::cpu
