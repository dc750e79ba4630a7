// Elements that do not lie one after the other. Included by *_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/vec.hpp"
#include "kvlink/layout/rows.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

inline constexpr int64_t kStridedChunk = 1024;  // elements gathered at a time, on the stack

KVLINK_INLINE bool is_strided(const RowPlane& plane, int64_t dims) {
  return plane.at.stride_dim != 1 && dims != 1;
}

template <typename T>
KVLINK_INLINE void copy_elements_of(char* dst, int64_t dst_step, const char* src, int64_t src_step,
                                    int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T value;
    __builtin_memcpy(&value, src + i * src_step, sizeof value);
    __builtin_memcpy(dst + i * dst_step, &value, sizeof value);
  }
}

// Steps are in bytes.
KVLINK_INLINE void copy_elements(char* dst, int64_t dst_step, const char* src, int64_t src_step,
                                 int64_t count, int64_t element_bytes) {
  if (src_step == element_bytes && dst_step == element_bytes) {
    __builtin_memcpy(dst, src, static_cast<size_t>(count * element_bytes));
  } else if (element_bytes == 1) {
    copy_elements_of<uint8_t>(dst, dst_step, src, src_step, count);
  } else if (element_bytes == 2) {
    copy_elements_of<uint16_t>(dst, dst_step, src, src_step, count);
  } else {
    copy_elements_of<uint32_t>(dst, dst_step, src, src_step, count);
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
