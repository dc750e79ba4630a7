#include <cstring>

#include "kvlink/base/convert.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/words.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

constexpr int64_t kChunk = 1024;  // elements converted at a time, on the stack

// --- copying --------------------------------------------------------------------------------

struct Axis {
  int64_t size, src, dst;  // strides in bytes
};

inline void copy_run(char* dst, const char* src, int64_t num_bytes) {
  if (num_bytes <= 1024 && num_bytes % 64 == 0) {
    for (int64_t i = 0; i < num_bytes; i += 64) std::memcpy(dst + i, src + i, 64);
  } else {
    std::memcpy(dst, src, static_cast<size_t>(num_bytes));
  }
}

template <typename T>
void copy_elements(char* dst, const char* src, const Axis& axis) {
  for (int64_t i = 0; i < axis.size; ++i) {
    T value;
    std::memcpy(&value, src + i * axis.src, sizeof value);
    std::memcpy(dst + i * axis.dst, &value, sizeof value);
  }
}

void copy_inner(char* dst, const char* src, const Axis& axis, int64_t element_bytes) {
  if (axis.src == element_bytes && axis.dst == element_bytes) {
    copy_run(dst, src, axis.size * element_bytes);
  } else if (element_bytes == 1) {
    copy_elements<uint8_t>(dst, src, axis);
  } else if (element_bytes == 2) {
    copy_elements<uint16_t>(dst, src, axis);
  } else {
    copy_elements<uint32_t>(dst, src, axis);
  }
}

// Copies a box of three axes, in the longest runs that both sides allow.
void copy_box(char* dst, const char* src, const Axis (&given)[3], int64_t element_bytes) {
  // Axes of size 1 go; the rest are sorted outermost first.
  Axis axes[3];
  int count = 0;
  for (const Axis& axis : given) {
    if (axis.size == 1) continue;
    int i = count++;
    for (; i > 0 && axes[i - 1].dst < axis.dst; --i) axes[i] = axes[i - 1];
    axes[i] = axis;
  }
  // What continues its inner neighbour on both sides becomes one axis with it.
  for (int i = count - 1; i > 0; --i) {
    Axis& inner = axes[i];
    Axis& outer = axes[i - 1];
    if (outer.src != inner.src * inner.size || outer.dst != inner.dst * inner.size) continue;
    outer = {outer.size * inner.size, inner.src, inner.dst};
    --count;
    for (int j = i; j < count; ++j) axes[j] = axes[j + 1];
  }
  const Axis none{1, element_bytes, element_bytes};
  const Axis& inner = count > 0 ? axes[count - 1] : none;
  const Axis& middle = count > 1 ? axes[count - 2] : none;
  const Axis& outer = count > 2 ? axes[count - 3] : none;
  for (int64_t i = 0; i < outer.size; ++i) {
    for (int64_t j = 0; j < middle.size; ++j) {
      copy_inner(dst + i * outer.dst + j * middle.dst, src + i * outer.src + j * middle.src, inner,
                 element_bytes);
    }
  }
}

void copy_rows(const RowMove& move, const RowBox& box) {
  const RowPlane& src = move.src;
  const RowPlane& dst = move.dst;
  const int64_t size = dtype_bytes(dst.dtype);
  copy_box(dst.row(box.dst_page, box.dst_slot, move.dst_head),
           src.row(box.src_page, box.src_slot, move.src_head),
           {{box.num_tokens, src.at.stride_slot * size, dst.at.stride_slot * size},
            {move.num_heads, src.at.stride_head * size, dst.at.stride_head * size},
            {move.dims, src.at.stride_dim * size, dst.at.stride_dim * size}},
           size);
  if (!dst.token_scale) return;
  copy_box(reinterpret_cast<char*>(dst.row_scale(box.dst_page, box.dst_slot, move.dst_head)),
           reinterpret_cast<const char*>(src.row_scale(box.src_page, box.src_slot, move.src_head)),
           {{box.num_tokens, src.scale_at.stride_slot * 4, dst.scale_at.stride_slot * 4},
            {move.num_heads, src.scale_at.stride_head * 4, dst.scale_at.stride_head * 4},
            {1, 4, 4}},
           4);
}

// --- converting -----------------------------------------------------------------------------

template <DType kDType>
void load_values(const char* __restrict data, int64_t stride, int64_t count, float scale,
                 float* __restrict out) {
  using Type = typename Storage<kDType>::Type;
  const auto* stored = reinterpret_cast<const Type*>(data);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = Storage<kDType>::load(stored[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = Storage<kDType>::load(stored[i * stride]);
  }
  if (scale == 1.0f) return;
  for (int64_t i = 0; i < count; ++i) out[i] *= scale;
}

template <DType kDType>
void store_values(float* __restrict values, int64_t stride, int64_t count, float scale,
                  char* __restrict data) {
  using Type = typename Storage<kDType>::Type;
  auto* stored = reinterpret_cast<Type*>(data);
  if (scale != 1.0f) {
    for (int64_t i = 0; i < count; ++i) values[i] /= scale;
  }
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) stored[i] = Storage<kDType>::store(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) stored[i * stride] = Storage<kDType>::store(values[i]);
  }
}

// By dtype; uint8 has no values, and host code refuses to convert it.
using Load = void (*)(const char*, int64_t, int64_t, float, float*);
using Store = void (*)(float*, int64_t, int64_t, float, char*);
constexpr Load kLoad[] = {load_values<DType::kFloat32>,    load_values<DType::kFloat16>,
                          load_values<DType::kBFloat16>,   load_values<DType::kFloat8E4M3>,
                          load_values<DType::kFloat8E5M2>, load_values<DType::kInt8>};
constexpr Store kStore[] = {store_values<DType::kFloat32>,    store_values<DType::kFloat16>,
                            store_values<DType::kBFloat16>,   store_values<DType::kFloat8E4M3>,
                            store_values<DType::kFloat8E5M2>, store_values<DType::kInt8>};

// Bits of the largest finite magnitude, which order like the values.
uint32_t finite_amax_bits(const float* values, int64_t count) {
  int32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<int32_t>(float_bits(values[i]) & 0x7fffffffu);
    const int32_t finite = magnitude < 0x7f800000 ? magnitude : 0;
    amax = finite > amax ? finite : amax;
  }
  return static_cast<uint32_t>(amax);
}

void convert_row(const RowMove& move, const char* src, float src_scale, char* dst,
                 float* dst_scale) {
  alignas(64) float values[kChunk];
  const Load load = kLoad[static_cast<int>(move.src.dtype)];
  const Store store = kStore[static_cast<int>(move.dst.dtype)];
  const int64_t src_step = move.src.at.stride_dim * dtype_bytes(move.src.dtype);
  const int64_t dst_step = move.dst.at.stride_dim * dtype_bytes(move.dst.dtype);
  const bool whole = move.dims <= kChunk;
  if (move.dst.token_scale) {
    uint32_t amax = 0;
    for (int64_t i = 0; i < move.dims; i += kChunk) {
      const int64_t count = move.dims - i < kChunk ? move.dims - i : kChunk;
      load(src + i * src_step, move.src.at.stride_dim, count, src_scale, values);
      const uint32_t bits = finite_amax_bits(values, count);
      amax = amax < bits ? bits : amax;
    }
    *dst_scale = dynamic_scale(float_from_bits(amax), move.dst.dtype);
  } else if (whole) {
    load(src, move.src.at.stride_dim, move.dims, src_scale, values);
  }
  const float scale = dst_scale ? *dst_scale : 1.0f;
  if (whole) return store(values, move.dst.at.stride_dim, move.dims, scale, dst);
  for (int64_t i = 0; i < move.dims; i += kChunk) {
    const int64_t count = move.dims - i < kChunk ? move.dims - i : kChunk;
    load(src + i * src_step, move.src.at.stride_dim, count, src_scale, values);
    store(values, move.dst.at.stride_dim, count, scale, dst + i * dst_step);
  }
}

void convert_rows(const RowMove& move, const RowBox& box) {
  // Rows whose static scales happen to agree keep their bytes.
  const bool may_copy =
      move.src.dtype == move.dst.dtype && !move.src.token_scale && !move.dst.token_scale;
  const int64_t size = dtype_bytes(move.dst.dtype);
  const Axis row_axis{move.dims, move.src.at.stride_dim * size, move.dst.at.stride_dim * size};
  for (int64_t token = 0; token < box.num_tokens; ++token) {
    for (int32_t head = 0; head < move.num_heads; ++head) {
      const int64_t src_slot = box.src_slot + token, src_head = move.src_head + head;
      const int64_t dst_slot = box.dst_slot + token, dst_head = move.dst_head + head;
      const char* src = move.src.row(box.src_page, src_slot, src_head);
      char* dst = move.dst.row(box.dst_page, dst_slot, dst_head);
      const float src_scale =
          move.src.scale ? *move.src.row_scale(box.src_page, src_slot, src_head) : 1.0f;
      float* dst_scale =
          move.dst.scale ? move.dst.row_scale(box.dst_page, dst_slot, dst_head) : nullptr;
      if (may_copy && src_scale == (dst_scale ? *dst_scale : 1.0f)) {
        copy_inner(dst, src, row_axis, size);
      } else {
        convert_row(move, src, src_scale, dst, dst_scale);
      }
    }
  }
}

// --- digesting ------------------------------------------------------------------------------

// num_bytes is whole stripes except in the last call for a row.
inline void digest_bytes(RowLanes& lanes, const char* data, int64_t num_bytes) {
  int64_t i = 0;
  for (; i + row_digest::kStripeBytes <= num_bytes; i += row_digest::kStripeBytes) {
    lanes.stripe(Words::load(data + i));
  }
  if (i == num_bytes) return;
  char last[row_digest::kStripeBytes] = {};
  std::memcpy(last, data + i, static_cast<size_t>(num_bytes - i));
  lanes.stripe(Words::load(last));
}

Words row_lanes(const RowMove& move, const char* row, int64_t size) {
  RowLanes lanes;
  if (move.dst.at.stride_dim == 1 || move.dims == 1) {
    digest_bytes(lanes, row, move.dims * size);
    return lanes.acc();
  }
  alignas(64) char gathered[kChunk * 4];
  const int64_t step = move.dst.at.stride_dim * size;
  for (int64_t i = 0; i < move.dims; i += kChunk) {
    const int64_t count = move.dims - i < kChunk ? move.dims - i : kChunk;
    copy_inner(gathered, row + i * step, {count, step, size}, size);
    digest_bytes(lanes, gathered, count * size);
  }
  return lanes.acc();
}

}  // namespace

uint64_t digest_rows(const RowMove& move, const RowBox& box) {
  constexpr int32_t kHeads = 64;  // taken together
  const int64_t size = dtype_bytes(move.dst.dtype);
  DigestSum sum;
  const auto digest_row = [&](const Words& start, int64_t token, int32_t head) {
    const int64_t dst_slot = box.dst_slot + token, dst_head = move.dst_head + head;
    uint64_t shift = row_digest::shift(box.token_position + token);
    if (move.dst.token_scale) {
      const float scale = *move.dst.row_scale(box.dst_page, dst_slot, dst_head);
      shift += row_digest::scale_shift(float_bits(scale));
    }
    const char* row = move.dst.row(box.dst_page, dst_slot, dst_head);
    sum.add_row(row_lanes(move, row, size), start, shift);
  };
  // Rows are read in the order of their addresses, which the CPU can fetch ahead.
  const bool heads_inside = move.dst.at.stride_head < move.dst.at.stride_slot;
  for (int32_t first = 0; first < move.num_heads; first += kHeads) {
    const int32_t count = move.num_heads - first < kHeads ? move.num_heads - first : kHeads;
    Words starts[kHeads];
    for (int32_t i = 0; i < count; ++i) {
      const uint64_t base = row_digest::base(move.model_layer, move.model_head + first + i,
                                             move.model_plane, move.dims * size);
      uint64_t start[8];
      for (int j = 0; j < 8; ++j) start[j] = row_digest::start(base, j);
      starts[i] = Words::load(start);
    }
    const int64_t num_outer = heads_inside ? box.num_tokens : count;
    const int64_t num_inner = heads_inside ? count : box.num_tokens;
    for (int64_t outer = 0; outer < num_outer; ++outer) {
      for (int64_t inner = 0; inner < num_inner; ++inner) {
        const auto head = static_cast<int32_t>(heads_inside ? inner : outer);
        digest_row(starts[head], heads_inside ? outer : inner, first + head);
      }
    }
  }
  return sum.total();
}

uint64_t move_rows(const RowMove& move, const RowBox& box) {
  if (move.verbatim) {
    copy_rows(move, box);
  } else {
    convert_rows(move, box);
  }
  return move.with_digest ? digest_rows(move, box) : 0;
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
