// The one source of KV-cache addresses, for the host and the device. docs/kv_layout.md is its
// specification and kvlink/layout.py its Python mirror; property tests hold the three together.
#pragma once

#include <cstdint>

#include "kvlink/base/dtype.hpp"
#include "kvlink/base/hd.hpp"

namespace kvlink {

// Numbers are part of the serialised layout.
enum class KVForm : uint8_t {
  kSeparate = 0,  // K and V are planes of their own
  kPacked = 1,    // K and V of one head lie side by side: [... head_dim | head_dim_v]
  kLatent = 2,    // MLA: one plane; V is the first head_dim_v elements of K
  kOpaque = 3,    // one plane of elements only their owner understands; moved whole
};

enum class ScaleGranularity : uint8_t {
  kNone = 0,       // stored values are the values
  kTensor = 1,     // one scale for all of a layer's K, one for its V
  kHead = 2,       // one scale per KV head
  kTokenHead = 3,  // one scale per token and KV head
};

// A strided array indexed [page][slot][head][dim]. Strides count elements of the plane's own type
// (the layout's dtype, or float32 for scales); a stride of 0 broadcasts.
struct Plane {
  int64_t offset_bytes = 0;  // of element [0][0][0][0], from the layer's base
  int64_t stride_page = 0;
  int64_t stride_slot = 0;
  int64_t stride_head = 0;
  int64_t stride_dim = 0;

  KVLINK_HD int64_t element(int64_t page, int64_t slot, int64_t head, int64_t dim) const {
    return page * stride_page + slot * stride_slot + head * stride_head + dim * stride_dim;
  }
};

struct KVLayout {
  KVForm form = KVForm::kSeparate;
  DType dtype = DType::kFloat32;
  ScaleGranularity scale = ScaleGranularity::kNone;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;    // of K, and of q
  int32_t head_dim_v = 0;  // of V, and of the output; 0 when opaque
  int32_t page_size = 0;   // slots in a page
  Plane k, v, k_scale, v_scale;

  // V occupies bytes of its own (latent V aliases K; opaque pages have none).
  KVLINK_HD bool has_v_plane() const {
    return form == KVForm::kSeparate || form == KVForm::kPacked;
  }
  KVLINK_HD bool has_scales() const { return scale != ScaleGranularity::kNone; }

  // Bytes from the layer's base to one element.
  KVLINK_HD int64_t k_offset(int64_t page, int64_t slot, int64_t head, int64_t dim) const {
    return k.offset_bytes + k.element(page, slot, head, dim) * dtype_bytes(dtype);
  }
  KVLINK_HD int64_t v_offset(int64_t page, int64_t slot, int64_t head, int64_t dim) const {
    return v.offset_bytes + v.element(page, slot, head, dim) * dtype_bytes(dtype);
  }
  KVLINK_HD int64_t k_scale_offset(int64_t page, int64_t slot, int64_t head) const {
    return k_scale.offset_bytes + k_scale.element(page, slot, head, 0) * 4;
  }
  KVLINK_HD int64_t v_scale_offset(int64_t page, int64_t slot, int64_t head) const {
    return v_scale.offset_bytes + v_scale.element(page, slot, head, 0) * 4;
  }
};

// One stored layer in memory. Each pointer is element [0][0][0][0] of its plane: an engine may hold
// K and V in allocations of their own, so a plane's offset_bytes is already applied here.
struct LayerView {
  KVLayout layout;
  void* k = nullptr;         // [num_pages][page_size][num_kv_heads][head_dim]
  void* v = nullptr;         // the same with head_dim_v; latent: equals k; opaque: null
  float* k_scale = nullptr;  // null without scales
  float* v_scale = nullptr;  // null without scales; latent: equals k_scale
  int64_t num_pages = 0;
};

}  // namespace kvlink
