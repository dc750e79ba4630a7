#include "kvlink/cpu/append_kv.hpp"

#include <algorithm>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/move_rows.hpp"

namespace kvlink::cpu {

namespace {

void check(const AppendKVParams& params) {
  const KVLayout& layout = params.kv.layout;
  if (layout.form == KVForm::kOpaque) {
    throw Unsupported("append_kv: only the owner of opaque pages can write into them");
  }
  KVLINK_CHECK(params.dtype == DType::kFloat32 || params.dtype == DType::kFloat16 ||
                   params.dtype == DType::kBFloat16,
               "k: expected dtype float32, float16 or bfloat16; got ", dtype_name(params.dtype));
  KVLINK_CHECK(layout.dtype != DType::kUInt8, "dtype: uint8 is for opaque pages");
  const int64_t num_slots = params.kv.num_pages * layout.page_size;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t slot = params.slots[t];
    KVLINK_CHECK(slot >= -1 && slot < num_slots, "slots[", t, "]: expected -1 or a slot in [0, ",
                 num_slots, "); got ", slot);
  }
}

// Tokens that go to consecutive slots of a page make one box. The tokens' own tensor is a plane
// of one page.
std::vector<RowBox> plan_boxes(const AppendKVParams& params, int64_t max_tokens) {
  const int64_t page_size = params.kv.layout.page_size;
  std::vector<RowBox> boxes;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t slot = params.slots[t];
    if (slot < 0) continue;
    if (t > 0 && !boxes.empty() && params.slots[t - 1] == slot - 1 && slot % page_size != 0 &&
        boxes.back().num_tokens < max_tokens) {
      ++boxes.back().num_tokens;
      continue;
    }
    boxes.push_back({.src_page = 0,
                     .src_slot = t,
                     .dst_page = slot / page_size,
                     .dst_slot = slot % page_size,
                     .num_tokens = 1});
  }
  return boxes;
}

}  // namespace

void append_kv(const AppendKVParams& params) {
  check(params);
  const KVLayout& layout = params.kv.layout;
  std::vector<RowMove> moves;
  for (int plane = 0; plane < num_planes(layout); ++plane) {
    const void* data = plane == 0 ? params.k : params.v;
    RowPlane tokens{
        .data = static_cast<char*>(const_cast<void*>(data)),  // only read
        .scale = nullptr,
        .dtype = params.dtype,
        .token_scale = false,
        .at = {.stride_slot = plane == 0 ? params.k_stride_token : params.v_stride_token,
               .stride_head = plane == 0 ? params.k_stride_head : params.v_stride_head,
               .stride_dim = 1},
        .scale_at = {}};
    RowMove move{.src = tokens,
                 .dst = row_plane(params.kv, plane),
                 .dims = row_dims(layout, plane),
                 .num_heads = layout.num_kv_heads};
    move.verbatim = moves_verbatim(move);
    moves.push_back(move);
  }
  for_each_box(moves, plan_boxes(params, box_tokens(moves)), KVLINK_SIMD_PICK(move_rows));
}

}  // namespace kvlink::cpu
