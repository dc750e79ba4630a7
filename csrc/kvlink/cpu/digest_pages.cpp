#include "kvlink/cpu/digest_pages.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/move_rows.hpp"

namespace kvlink::cpu {

RelayoutResult digest_pages(const DigestParams& params) {
  KVLINK_CHECK(params.num_layers >= 1, "num_layers: expected >= 1; got ", params.num_layers);
  const LayerView& first = params.layers[0];
  const int64_t page_size = first.layout.page_size;
  std::vector<RowMove> moves;
  for (int32_t i = 0; i < params.num_layers; ++i) {
    const LayerView& layer = params.layers[i];
    KVLINK_CHECK(params.head >= 0 && params.num_heads >= 1 &&
                     params.head <= layer.layout.num_kv_heads - params.num_heads,
                 "head: expected heads within [0, ", layer.layout.num_kv_heads, "); got ",
                 params.head, " to ", int64_t{params.head} + params.num_heads - 1);
    KVLINK_CHECK(layer.layout.page_size == page_size && layer.num_pages == first.num_pages,
                 "layers: expected one page size and page count");
    for (int plane = 0; plane < num_planes(layer.layout); ++plane) {
      moves.push_back({.src = {},
                       .dst = row_plane(layer, plane),
                       .dims = row_dims(layer.layout, plane),
                       .num_heads = params.num_heads,
                       .src_head = 0,
                       .dst_head = params.head,
                       .verbatim = true,
                       .with_digest = true,
                       .model_layer = params.model_layers ? params.model_layers[i] : i,
                       .model_head = params.model_head,
                       .model_plane = plane});
    }
  }
  check_run(params.run, params.num_tokens, page_size, first.num_pages, "pages");
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
