#include "kvlink/cpu/digest_pages.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cpu {

RelayoutResult digest_pages(const DigestParams& params) {
  const std::vector<RowMove> moves = plan_digests(params);
  const int64_t page_size = params.layers[0].layout.page_size;
  check_run(params.run, params.num_tokens, params.layers[0], "pages");
  const int64_t max_tokens = box_tokens(moves);
  std::vector<RowBox> boxes;
  for (int64_t token = 0; token < params.num_tokens;) {
    const int64_t slot = params.run.first_slot + token;
    const int64_t count =
        std::min({page_size - slot % page_size, max_tokens, params.num_tokens - token});
    boxes.push_back({.dst_page = params.run.pages[slot / page_size],
                     .dst_slot = slot % page_size,
                     .num_tokens = count,
                     .token_position = params.token_position + token});
    token += count;
  }
  const uint64_t digest = for_each_box(moves, boxes, KVLINK_SIMD_PICK(digest_rows));
  return {.rows = static_cast<uint64_t>(params.num_tokens) * params.num_heads * moves.size(),
          .digest = digest};
}

}  // namespace kvlink::cpu
