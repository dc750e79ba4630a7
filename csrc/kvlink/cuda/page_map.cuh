// A plane of pages as bulk copies see it.
#pragma once

#include "kvlink/cuda/tensor_map.cuh"
#include "kvlink/layout/kv_layout.hpp"

namespace kvlink::cuda {

// Of 16-bit elements, and `data` at element [0][0][0][0].
inline bool copied_by_boxes(const Plane& plane, const void* data) {
  constexpr int64_t kEnd = int64_t{1} << 39;  // elements
  for (const int64_t stride : {plane.stride_page, plane.stride_slot, plane.stride_head}) {
    if (stride <= 0 || stride % 8 != 0 || stride >= kEnd) return false;
  }
  return plane.stride_dim == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Boxes are of 64 dims of `box_tokens` slots of a page and head; axes: dim, slot, head, page.
inline TensorMap page_map(const KVLayout& layout, const Plane& plane, const void* data, int dims,
                          int64_t num_pages, int box_tokens) {
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  return make_tensor_map(
      {.data = data,
       .sizes = {size(dims), size(layout.page_size), size(layout.num_kv_heads), size(num_pages)},
       .strides = {size(plane.stride_slot) * 2, size(plane.stride_head) * 2,
                   size(plane.stride_page) * 2},
       .box = {64, static_cast<uint32_t>(box_tokens), 1, 1}});
}

}  // namespace kvlink::cuda
