// Moving rows between planes: what append_kv, relayout_pages and digest_pages share.
#pragma once

#include <cstdint>
#include <vector>

#include "kvlink/base/simd_level.hpp"
#include "kvlink/layout/kv_layout.hpp"
#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::cpu {

// Rows of elements, [page][slot][head][dim], and their scales, [page][slot][head].
struct RowPlane {
  char* data = nullptr;    // element [0][0][0][0]
  float* scale = nullptr;  // null: values are stored as they are
  DType dtype = DType::kFloat32;
  bool token_scale = false;  // a scale per row, computed when the row is quantised
  Plane at, scale_at;        // strides alone; offsets are in the pointers

  char* row(int64_t page, int64_t slot, int64_t head) const {
    return data + at.element(page, slot, head, 0) * dtype_bytes(dtype);
  }
  float* row_scale(int64_t page, int64_t slot, int64_t head) const {
    return scale + scale_at.element(page, slot, head, 0);
  }
};

// The heads of one plane of one layer.
struct RowMove {
  RowPlane src, dst;
  int64_t dims = 0;
  int32_t num_heads = 0;
  int32_t src_head = 0, dst_head = 0;
  bool verbatim = false;  // stored bytes (and scales per row) are copied as they are
  bool with_digest = false;
  int32_t model_layer = 0, model_head = 0, model_plane = 0;
};

// num_tokens tokens, in consecutive slots of one page on either side.
struct RowBox {
  int64_t src_page = 0, src_slot = 0;
  int64_t dst_page = 0, dst_slot = 0;
  int64_t num_tokens = 0;
  int64_t token_position = 0;  // of the first; enters the digest
};

// Both return the sum of the destination's row digests, 0 unless asked for one.
KVLINK_SIMD_DECLARE(uint64_t move_rows(const RowMove& move, const RowBox& box);
                    uint64_t digest_rows(const RowMove& move, const RowBox& box);)

// The planes of a layer that have bytes of their own: K, and V unless it is part of K.
int num_planes(const KVLayout& layout);
RowPlane row_plane(const LayerView& layer, int plane);
int64_t row_dims(const KVLayout& layout, int plane);

// Same type and same scales: stored bytes mean the same on both sides.
bool moves_verbatim(const RowMove& move);

// Throws InvalidArgument when the run does not lie in its pages, PageTableError when one of the
// entries it uses names no page of the pool. `name` is the argument the pages came in.
void check_run(const TokenRun& run, int64_t num_tokens, int64_t page_size, int64_t num_pages,
               const char* name);

// Most tokens in a box, so that a box is work worth a task of its own at most.
int64_t box_tokens(const std::vector<RowMove>& moves);

using RowFunction = uint64_t(const RowMove& move, const RowBox& box);
// Applies `function` to every move and box on the thread pool; the sum of what it returns.
uint64_t for_each_box(const std::vector<RowMove>& moves, const std::vector<RowBox>& boxes,
                      RowFunction* function);

}  // namespace kvlink::cpu
