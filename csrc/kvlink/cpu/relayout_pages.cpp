#include "kvlink/cpu/relayout_pages.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/move_rows.hpp"

namespace kvlink::cpu {

namespace {

const char* form_name(KVForm form) {
  constexpr const char* kNames[] = {"separate", "packed", "latent", "opaque"};
  return kNames[static_cast<int>(form)];
}

std::string describe(const KVLayout& layout) {
  return concat(form_name(layout.form), " pages of ", layout.head_dim, " x ",
                dtype_name(layout.dtype));
}

void check_layers(const KVLayout& src, const KVLayout& dst) {
  const bool same_meaning = src.form == dst.form || (src.has_v_plane() && dst.has_v_plane());
  const bool opaque = src.form == KVForm::kOpaque;
  const bool same_elements = src.dtype == dst.dtype && src.head_dim == dst.head_dim;
  if (!same_meaning || (opaque && !same_elements)) {
    throw Unsupported(concat("relayout_pages: no conversion from ", describe(src), " to ",
                             describe(dst),
                             "; separate and packed convert to each other, latent to latent, "
                             "opaque to opaque of the same elements"));
  }
  KVLINK_CHECK(src.head_dim == dst.head_dim && src.head_dim_v == dst.head_dim_v,
               "head_dim and head_dim_v: expected ", src.head_dim, " and ", src.head_dim_v,
               " as in the source; got ", dst.head_dim, " and ", dst.head_dim_v);
  KVLINK_CHECK(opaque || (src.dtype != DType::kUInt8 && dst.dtype != DType::kUInt8),
               "dtype: uint8 is for opaque pages");
}

void check_heads(const char* name, int32_t first, int32_t count, int32_t num_kv_heads) {
  KVLINK_CHECK(first >= 0 && count >= 1 && first <= num_kv_heads - count, name,
               ": expected heads within [0, ", num_kv_heads, "); got ", first, " to ",
               int64_t{first} + count - 1);
}

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

void check(const RelayoutParams& params) {
  KVLINK_CHECK(params.num_layers >= 1, "num_layers: expected >= 1; got ", params.num_layers);
  const LayerView& src = params.src_layers[0];
  const LayerView& dst = params.dst_layers[0];
  for (int32_t i = 0; i < params.num_layers; ++i) {
    const LayerView& from = params.src_layers[i];
    const LayerView& to = params.dst_layers[i];
    check_layers(from.layout, to.layout);
    check_heads("src_head", params.src_head, params.num_heads, from.layout.num_kv_heads);
    check_heads("dst_head", params.dst_head, params.num_heads, to.layout.num_kv_heads);
    KVLINK_CHECK(from.layout.page_size == src.layout.page_size && from.num_pages == src.num_pages &&
                     to.layout.page_size == dst.layout.page_size && to.num_pages == dst.num_pages,
                 "layers: expected one page size and page count on either side");
  }
  check_run(params.src, params.num_tokens, src.layout.page_size, src.num_pages, "src_pages");
  check_run(params.dst, params.num_tokens, dst.layout.page_size, dst.num_pages, "dst_pages");
}

std::vector<RowMove> plan_moves(const RelayoutParams& params) {
  std::vector<RowMove> moves;
  for (int32_t i = 0; i < params.num_layers; ++i) {
    const LayerView& from = params.src_layers[i];
    const LayerView& to = params.dst_layers[i];
    for (int plane = 0; plane < num_planes(to.layout); ++plane) {
      RowMove move{.src = row_plane(from, plane),
                   .dst = row_plane(to, plane),
                   .dims = row_dims(to.layout, plane),
                   .num_heads = params.num_heads,
                   .src_head = params.src_head,
                   .dst_head = params.dst_head,
                   .verbatim = false,
                   .with_digest = params.with_digest,
                   .model_layer = params.model_layers ? params.model_layers[i] : i,
                   .model_head = params.model_head,
                   .model_plane = plane};
      move.verbatim = moves_verbatim(move);
      moves.push_back(move);
    }
  }
  return moves;
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

}  // namespace

RelayoutResult relayout_pages(const RelayoutParams& params) {
  check(params);
  if (params.num_tokens == 0) return {};
  check_overlap(params);
  const std::vector<RowMove> moves = plan_moves(params);
  const std::vector<RowBox> boxes = plan_boxes(params, box_tokens(moves));
  const uint64_t digest = for_each_box(moves, boxes, KVLINK_SIMD_PICK(move_rows));
  return {.rows = static_cast<uint64_t>(params.num_tokens) * params.num_heads * moves.size(),
          .digest = digest};
}

}  // namespace kvlink::cpu
