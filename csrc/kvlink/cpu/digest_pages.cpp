#include "kvlink/cpu/digest_pages.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/params/plan_moves.hpp"

namespace kvlink::cpu {

RelayoutResult digest_pages(const DigestParams& params) {
  const std::vector<RowMove> planes = plan_digests(params);
  const std::vector<RowMove> moves = join_planes(planes);
  const int64_t page_size = params.layers[0].layout.page_size;
  check_run(params.run, params.num_tokens, params.layers[0], "pages");
  const int64_t max_tokens = box_tokens(moves);
  const auto planner = [&](int64_t first, int64_t count, std::vector<RowBox>& boxes) {
    const int64_t begin = params.run.first_slot + first;
    const int32_t* page = params.run.pages + begin / page_size;
    for (int64_t slot = begin % page_size, token = first; token < first + count;) {
      const int64_t num_tokens = std::min({page_size - slot, max_tokens, first + count - token});
      boxes.push_back({.dst_page = *page,
                       .dst_slot = slot,
                       .num_tokens = num_tokens,
                       .token_position = params.token_position + token});
      token += num_tokens;
      slot += num_tokens;
      if (slot == page_size) {
        slot = 0;
        ++page;
      }
    }
  };
  const uint64_t digest =
      for_each_box(moves, params.num_tokens, planner, KVLINK_SIMD_PICK(digest_rows));
  return {.rows = static_cast<uint64_t>(params.num_tokens) * params.num_heads * planes.size(),
          .digest = digest};
}

}  // namespace kvlink::cpu
