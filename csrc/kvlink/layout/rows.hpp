// Rows: one KV head of one token in one plane of one layer. What the host and the device agree on
// when they move or digest them.
#pragma once

#include <cstdint>

#include "kvlink/base/hd.hpp"
#include "kvlink/layout/kv_layout.hpp"

namespace kvlink {

// Rows of elements, [page][slot][head][dim], and their scales, [page][slot][head].
struct RowPlane {
  char* data = nullptr;    // element [0][0][0][0]
  float* scale = nullptr;  // null: values are stored as they are
  DType dtype = DType::kFloat32;
  bool token_scale = false;  // a scale per row, computed when the row is quantised
  Plane at, scale_at;        // strides alone; offsets are in the pointers

  KVLINK_HD char* row(int64_t page, int64_t slot, int64_t head) const {
    return data + at.element(page, slot, head, 0) * dtype_bytes(dtype);
  }
  KVLINK_HD float* row_scale(int64_t page, int64_t slot, int64_t head) const {
    return scale + scale_at.element(page, slot, head, 0);
  }
};

// The heads of one plane of one layer, on their way to another plane.
struct RowMove {
  RowPlane src, dst;
  int64_t dims = 0;
  int32_t num_heads = 0;
  int32_t src_head = 0, dst_head = 0;
  bool verbatim = false;  // stored bytes (and scales per row) are copied as they are
  bool with_digest = false;
  bool streaming = false;  // host: store around the caches where that is possible
  int32_t model_layer = 0, model_head = 0, model_plane = 0;  // enter the digest
  // Host: planes that are moved together, box by box; the second is that of model_plane + 1 and
  // lies so many bytes after the first.
  int32_t num_planes = 1;
  int64_t src_plane_bytes = 0, dst_plane_bytes = 0;
};

// The planes of a layer that have bytes of their own: K, and V unless it is part of K.
KVLINK_HD int num_planes(const KVLayout& layout) { return layout.has_v_plane() ? 2 : 1; }

KVLINK_HD int64_t row_dims(const KVLayout& layout, int plane) {
  return plane == 1 ? layout.head_dim_v : layout.head_dim;
}

KVLINK_HD RowPlane row_plane(const LayerView& layer, int plane) {
  const KVLayout& layout = layer.layout;
  RowPlane rows;
  rows.data = static_cast<char*>(plane == 1 ? layer.v : layer.k);
  rows.dtype = layout.dtype;
  rows.token_scale = layout.scale == ScaleGranularity::kTokenHead;
  rows.at = plane == 1 ? layout.v : layout.k;
  if (layout.has_scales()) {
    rows.scale = plane == 1 ? layer.v_scale : layer.k_scale;
    rows.scale_at = plane == 1 ? layout.v_scale : layout.k_scale;
  }
  return rows;
}

}  // namespace kvlink
