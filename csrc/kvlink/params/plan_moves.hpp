// Checks of what append_kv, relayout_pages and digest_pages are asked for, and the moves that it
// takes; the same on every backend. Page ids and slots are checked where they are read.
#pragma once

#include <string>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/params/append_kv.hpp"
#include "kvlink/params/relayout_pages.hpp"

namespace kvlink {

// The run lies in its pages. Throws InvalidArgument; `name` is the argument the pages came in.
inline void check_run_bounds(const TokenRun& run, int64_t num_tokens, int64_t page_size,
                             const char* name) {
  constexpr int64_t kMax = int64_t{1} << 48;
  KVLINK_CHECK(run.first_slot >= 0 && run.first_slot < kMax, name,
               ": expected a first slot >= 0; got ", run.first_slot);
  KVLINK_CHECK(num_tokens >= 0 && num_tokens < kMax, "num_tokens: expected >= 0; got ", num_tokens);
  if (num_tokens == 0) return;
  const int64_t end = ceil_div(run.first_slot + num_tokens, page_size);
  KVLINK_CHECK(end <= run.num_pages, name, ": expected at least ", end, " pages for ", num_tokens,
               " tokens from slot ", run.first_slot, "; got ", run.num_pages);
}

inline const char* kv_form_name(KVForm form) {
  constexpr const char* kNames[] = {"separate", "packed", "latent", "opaque"};
  return kNames[static_cast<int>(form)];
}

inline std::string describe_pages(const KVLayout& layout) {
  return concat(kv_form_name(layout.form), " pages of ", layout.head_dim, " x ",
                dtype_name(layout.dtype));
}

inline void check_same_meaning(const KVLayout& src, const KVLayout& dst) {
  const bool same_meaning = src.form == dst.form || (src.has_v_plane() && dst.has_v_plane());
  const bool opaque = src.form == KVForm::kOpaque;
  const bool same_elements = src.dtype == dst.dtype && src.head_dim == dst.head_dim;
  if (!same_meaning || (opaque && !same_elements)) {
    throw Unsupported(concat("relayout_pages: no conversion from ", describe_pages(src), " to ",
                             describe_pages(dst),
                             "; separate and packed convert to each other, latent to latent, "
                             "opaque to opaque of the same elements"));
  }
  KVLINK_CHECK(src.head_dim == dst.head_dim && src.head_dim_v == dst.head_dim_v,
               "head_dim and head_dim_v: expected ", src.head_dim, " and ", src.head_dim_v,
               " as in the source; got ", dst.head_dim, " and ", dst.head_dim_v);
  KVLINK_CHECK(opaque || (src.dtype != DType::kUInt8 && dst.dtype != DType::kUInt8),
               "dtype: uint8 is for opaque pages");
}

inline void check_heads(const char* name, int32_t first, int32_t count, int32_t num_kv_heads) {
  KVLINK_CHECK(first >= 0 && count >= 1 && first <= num_kv_heads - count, name,
               ": expected heads within [0, ", num_kv_heads, "); got ", first, " to ",
               int64_t{first} + count - 1);
}

inline void check_layers(const RelayoutParams& params) {
  KVLINK_CHECK(params.num_layers >= 1, "num_layers: expected >= 1; got ", params.num_layers);
  const LayerView& src = params.src_layers[0];
  const LayerView& dst = params.dst_layers[0];
  for (int32_t i = 0; i < params.num_layers; ++i) {
    const LayerView& from = params.src_layers[i];
    const LayerView& to = params.dst_layers[i];
    check_same_meaning(from.layout, to.layout);
    check_heads("src_head", params.src_head, params.num_heads, from.layout.num_kv_heads);
    check_heads("dst_head", params.dst_head, params.num_heads, to.layout.num_kv_heads);
    KVLINK_CHECK(from.layout.page_size == src.layout.page_size && from.num_pages == src.num_pages &&
                     to.layout.page_size == dst.layout.page_size && to.num_pages == dst.num_pages,
                 "layers: expected one page size and page count on either side");
  }
}

// In the order of the layers, K before V; verbatim is left to the backend, which reads scales.
// Throws InvalidArgument, and Unsupported when the forms do not mean the same.
inline std::vector<RowMove> plan_moves(const RelayoutParams& params) {
  check_layers(params);
  std::vector<RowMove> moves;
  for (int32_t i = 0; i < params.num_layers; ++i) {
    const LayerView& from = params.src_layers[i];
    const LayerView& to = params.dst_layers[i];
    for (int plane = 0; plane < num_planes(to.layout); ++plane) {
      moves.push_back({.src = row_plane(from, plane),
                       .dst = row_plane(to, plane),
                       .dims = row_dims(to.layout, plane),
                       .num_heads = params.num_heads,
                       .src_head = params.src_head,
                       .dst_head = params.dst_head,
                       .verbatim = false,
                       .with_digest = params.with_digest,
                       .model_layer = params.model_layers ? params.model_layers[i] : i,
                       .model_head = params.model_head,
                       .model_plane = plane});
    }
  }
  return moves;
}

// The same moves without a source. Throws InvalidArgument.
inline std::vector<RowMove> plan_digests(const DigestParams& params) {
  KVLINK_CHECK(params.num_layers >= 1, "num_layers: expected >= 1; got ", params.num_layers);
  const LayerView& first = params.layers[0];
  const int64_t page_size = first.layout.page_size;
  std::vector<RowMove> moves;
  for (int32_t i = 0; i < params.num_layers; ++i) {
    const LayerView& layer = params.layers[i];
    check_heads("head", params.head, params.num_heads, layer.layout.num_kv_heads);
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
  return moves;
}

// The new tokens as a plane of one page, moved into the layer. Throws InvalidArgument, Unsupported.
inline std::vector<RowMove> plan_append(const AppendKVParams& params) {
  const KVLayout& layout = params.kv.layout;
  if (layout.form == KVForm::kOpaque) {
    throw Unsupported("append_kv: only the owner of opaque pages can write into them");
  }
  KVLINK_CHECK(params.dtype == DType::kFloat32 || params.dtype == DType::kFloat16 ||
                   params.dtype == DType::kBFloat16,
               "k: expected dtype float32, float16 or bfloat16; got ", dtype_name(params.dtype));
  KVLINK_CHECK(layout.dtype != DType::kUInt8, "dtype: uint8 is for opaque pages");
  std::vector<RowMove> moves;
  for (int plane = 0; plane < num_planes(layout); ++plane) {
    RowPlane tokens;
    // Only read.
    tokens.data = static_cast<char*>(const_cast<void*>(plane == 0 ? params.k : params.v));
    tokens.dtype = params.dtype;
    tokens.at = {.stride_slot = plane == 0 ? params.k_stride_token : params.v_stride_token,
                 .stride_head = plane == 0 ? params.k_stride_head : params.v_stride_head,
                 .stride_dim = 1};
    moves.push_back({.src = tokens,
                     .dst = row_plane(params.kv, plane),
                     .dims = row_dims(layout, plane),
                     .num_heads = layout.num_kv_heads,
                     .model_plane = plane});
  }
  return moves;
}

}  // namespace kvlink
