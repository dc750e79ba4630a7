// Moving rows on the device: what append_kv and relayout_pages share. A group of kLanes lanes of a
// warp moves one row; conversions and the digest are those of the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "kvlink/base/convert.hpp"
#include "kvlink/base/row_digest.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/params/rope.hpp"

namespace kvlink::cuda {

inline constexpr int kVector = 8;  // elements a lane converts at a time

// Where one row is, on both sides.
struct RowPlace {
  int64_t src_page, src_slot, src_head;
  int64_t dst_page, dst_slot, dst_head;
};

template <int kLanes>
struct Group {
  int lane = static_cast<int>(threadIdx.x) % kLanes;
  unsigned mask = static_cast<unsigned>((1ull << kLanes) - 1)
                  << (static_cast<int>(threadIdx.x) % 32 / kLanes * kLanes);

  __device__ void sync() const { __syncwarp(mask); }
  template <typename T>
  __device__ T exchange(T value, int distance) const {
    return __shfl_xor_sync(mask, value, distance, kLanes);
  }
};

// --- many layers in one launch --------------------------------------------------------------

// Where the rows of one plane of one layer are; all else is the same in every layer.
struct PlaneAddress {
  char* src;
  float* src_scale;
  char* dst;
  float* dst_scale;
  int32_t model_layer;
};

// A plane of a layer. NOTE: what all layers share stays where launches have it, not in registers.
struct LayerMove {
  const RowMove& all;
  PlaneAddress at;

  __device__ const char* src_row(const RowPlace& place) const {
    return at.src + all.src.at.element(place.src_page, place.src_slot, place.src_head, 0) *
                        dtype_bytes(all.src.dtype);
  }
  __device__ char* dst_row(const RowPlace& place) const {
    return at.dst + all.dst.at.element(place.dst_page, place.dst_slot, place.dst_head, 0) *
                        dtype_bytes(all.dst.dtype);
  }
  // Null: values are stored as they are.
  __device__ const float* src_row_scale(const RowPlace& place) const {
    if (!all.src.scale) return nullptr;
    return at.src_scale +
           all.src.scale_at.element(place.src_page, place.src_slot, place.src_head, 0);
  }
  __device__ float* dst_row_scale(const RowPlace& place) const {
    if (!all.dst.scale) return nullptr;
    return at.dst_scale +
           all.dst.scale_at.element(place.dst_page, place.dst_slot, place.dst_head, 0);
  }
};

// The planes of up to kMaxLayers layers, as they travel with a launch.
struct LayerMoves {
  static constexpr int kMaxLayers = 40;

  RowMove planes[2];
  PlaneAddress at[kMaxLayers][2];
  int32_t num_planes;

  __device__ LayerMove of(int idx) const {
    return {planes[idx % num_planes], at[idx / num_planes][idx % num_planes]};
  }
};

inline bool same_rows(const RowPlane& a, const RowPlane& b) {
  const auto same = [](const Plane& x, const Plane& y) {
    return x.stride_page == y.stride_page && x.stride_slot == y.stride_slot &&
           x.stride_head == y.stride_head && x.stride_dim == y.stride_dim;
  };
  return a.dtype == b.dtype && a.token_scale == b.token_scale && same(a.at, b.at) &&
         same(a.scale_at, b.scale_at) && (a.scale == nullptr) == (b.scale == nullptr);
}

// As many layers from `first` on as one launch takes: `moves` has `num_planes` for each, in order.
// *end: after the last of its moves.
inline LayerMoves take_layers(const std::vector<RowMove>& moves, int num_planes, size_t first,
                              size_t* end) {
  LayerMoves taken{};
  taken.num_planes = num_planes;
  size_t i = first;
  for (; i < moves.size() && i - first < size_t{LayerMoves::kMaxLayers} * num_planes; ++i) {
    const RowMove& move = moves[i];
    RowMove& plane = taken.planes[(i - first) % num_planes];
    if (i - first < static_cast<size_t>(num_planes)) plane = move;
    if (!same_rows(plane.src, move.src) || !same_rows(plane.dst, move.dst) ||
        plane.dims != move.dims) {
      i -= (i - first) % num_planes;
      break;
    }
    taken.at[(i - first) / num_planes][(i - first) % num_planes] = {
        move.src.data, move.src.scale, move.dst.data, move.dst.scale, move.model_layer};
  }
  *end = i;
  return taken;
}

// --- elements -------------------------------------------------------------------------------

template <DType kDType>
__device__ void load_vector(const char* data, int64_t stride, int count, float* out) {
  using Type = typename Storage<kDType>::Type;
  alignas(16) Type stored[kVector];
  const auto* from = reinterpret_cast<const Type*>(data);
  constexpr int kAlign = sizeof(stored) < 16 ? sizeof(stored) : 16;
  if (stride == 1 && count == kVector && reinterpret_cast<uintptr_t>(data) % kAlign == 0) {
    if constexpr (kAlign == 8) {
      *reinterpret_cast<uint2*>(stored) = *reinterpret_cast<const uint2*>(data);
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(stored) / 16); ++i) {
        reinterpret_cast<uint4*>(stored)[i] = reinterpret_cast<const uint4*>(data)[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) stored[i] = i < count ? from[i * stride] : Type{};
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) out[i] = Storage<kDType>::load(stored[i]);
}

template <DType kDType>
__device__ void store_vector(const float* values, int64_t stride, int count, char* data) {
  using Type = typename Storage<kDType>::Type;
  alignas(16) Type stored[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) stored[i] = Storage<kDType>::store(values[i]);
  auto* to = reinterpret_cast<Type*>(data);
  constexpr int kAlign = sizeof(stored) < 16 ? sizeof(stored) : 16;
  if (stride == 1 && count == kVector && reinterpret_cast<uintptr_t>(data) % kAlign == 0) {
    if constexpr (kAlign == 8) {
      *reinterpret_cast<uint2*>(data) = *reinterpret_cast<const uint2*>(stored);
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(stored) / 16); ++i) {
        reinterpret_cast<uint4*>(data)[i] = reinterpret_cast<const uint4*>(stored)[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) to[i * stride] = stored[i];
    }
  }
}

// uint8 has no values; the host refuses to convert it.
__device__ inline void load_values(DType dtype, const char* data, int64_t stride, int count,
                                   float* out) {
  switch (dtype) {
    case DType::kFloat32:
      return load_vector<DType::kFloat32>(data, stride, count, out);
    case DType::kFloat16:
      return load_vector<DType::kFloat16>(data, stride, count, out);
    case DType::kBFloat16:
      return load_vector<DType::kBFloat16>(data, stride, count, out);
    case DType::kFloat8E4M3:
      return load_vector<DType::kFloat8E4M3>(data, stride, count, out);
    case DType::kFloat8E5M2:
      return load_vector<DType::kFloat8E5M2>(data, stride, count, out);
    default:
      return load_vector<DType::kInt8>(data, stride, count, out);
  }
}

__device__ inline void store_values(DType dtype, const float* values, int64_t stride, int count,
                                    char* data) {
  switch (dtype) {
    case DType::kFloat32:
      return store_vector<DType::kFloat32>(values, stride, count, data);
    case DType::kFloat16:
      return store_vector<DType::kFloat16>(values, stride, count, data);
    case DType::kBFloat16:
      return store_vector<DType::kBFloat16>(values, stride, count, data);
    case DType::kFloat8E4M3:
      return store_vector<DType::kFloat8E4M3>(values, stride, count, data);
    case DType::kFloat8E5M2:
      return store_vector<DType::kFloat8E5M2>(values, stride, count, data);
    default:
      return store_vector<DType::kInt8>(values, stride, count, data);
  }
}

// --- rows -----------------------------------------------------------------------------------

template <int kLanes>
__device__ void copy_row(const Group<kLanes>& group, const RowMove& move, const char* src,
                         char* dst) {
  const int64_t size = dtype_bytes(move.dst.dtype);
  const int64_t num_bytes = move.dims * size;
  const bool contiguous = move.src.at.stride_dim == 1 && move.dst.at.stride_dim == 1;
  const uintptr_t low_bits =
      reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) | num_bytes;
  if (contiguous && low_bits % 16 == 0) {
    for (int64_t i = group.lane; i < num_bytes / 16; i += kLanes) {
      reinterpret_cast<uint4*>(dst)[i] = reinterpret_cast<const uint4*>(src)[i];
    }
    return;
  }
  for (int64_t i = group.lane; i < move.dims; i += kLanes) {
    const char* from = src + i * move.src.at.stride_dim * size;
    char* to = dst + i * move.dst.at.stride_dim * size;
    if (size == 1) {
      *to = *from;
    } else if (size == 2) {
      *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
    } else {
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
    }
  }
}

// A row's elements as they are.
struct PlainRow {
  const RowMove& move;
  const char* row;

  __device__ void load(int64_t first, int count, float* out) const {
    const int64_t stride = move.src.at.stride_dim;
    load_values(move.src.dtype, row + first * stride * dtype_bytes(move.src.dtype), stride, count,
                out);
  }
};

// The same, turned; products and sums are rounded one by one, as on the host.
struct TurnedRow {
  PlainRow plain;
  const RopeParams& rope;
  const float* cos;  // of the token; then the sines

  __device__ void load(int64_t first, int count, float* out) const {
    switch (plain.move.src.dtype) {
      case DType::kFloat32:
        return load<DType::kFloat32>(first, count, out);
      case DType::kFloat16:
        return load<DType::kFloat16>(first, count, out);
      default:
        return load<DType::kBFloat16>(first, count, out);
    }
  }

  template <DType kDType>
  __device__ void load(int64_t first, int count, float* out) const {
    load_at<kDType>(static_cast<int>(first), count, out);
    const int half = rope.rotary_dim / 2, dim = static_cast<int>(first) - rope.first_dim;
    const float* sin = cos + half;
    const bool within = dim >= 0 && dim + count <= rope.rotary_dim;
    if (!rope.interleaved && within && (dim >= half || dim + count <= half)) {
      const bool second = dim >= half;
      const int pair = second ? dim - half : dim;
      float others[kVector], cosines[kVector], sines[kVector];
      load_at<kDType>(rope.first_dim + (second ? pair : pair + half), count, others);
      load_vector<DType::kFloat32>(address(cos + pair), 1, count, cosines);
      load_vector<DType::kFloat32>(address(sin + pair), 1, count, sines);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        out[i] = turned(out[i], others[i], cosines[i], second ? sines[i] : -sines[i]);
      }
    } else if (rope.interleaved && within && dim % 2 == 0 && count == kVector) {
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        const int pair = (dim + i) / 2;
        const float a = out[i], b = out[i + 1];
        out[i] = turned(a, b, cos[pair], -sin[pair]);
        out[i + 1] = turned(b, a, cos[pair], sin[pair]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < count) out[i] = turned_alone<kDType>(dim + i, out[i]);
      }
    }
  }

  __device__ static const char* address(const void* at) { return static_cast<const char*>(at); }
  __device__ static float turned(float value, float other, float cosine, float sine) {
    return __fadd_rn(__fmul_rn(value, cosine), __fmul_rn(other, sine));
  }

  template <DType kDType>
  __device__ void load_at(int first, int count, float* out) const {
    const int64_t stride = plain.move.src.at.stride_dim;
    load_vector<kDType>(plain.row + first * stride * dtype_bytes(kDType), stride, count, out);
  }

  // Dim `dim` of those that turn, if it is one.
  template <DType kDType>
  __device__ float turned_alone(int dim, float value) const {
    using Type = typename Storage<kDType>::Type;
    const int half = rope.rotary_dim / 2;
    if (dim < 0 || dim >= rope.rotary_dim) return value;
    const bool second = rope.interleaved ? dim % 2 != 0 : dim >= half;
    const int pair = rope.interleaved ? dim / 2 : second ? dim - half : dim;
    const int partner = rope.first_dim + (rope.interleaved ? dim ^ 1 : second ? pair : dim + half);
    const auto* row = reinterpret_cast<const Type*>(plain.row);
    const float other = Storage<kDType>::load(row[partner * plain.move.src.at.stride_dim]);
    return turned(value, other, cos[pair], second ? cos[half + pair] : -cos[half + pair]);
  }
};

template <int kLanes, typename Row>
__device__ void convert_row(const Group<kLanes>& group, const RowMove& move, const Row& row,
                            float src_scale, char* dst, float* dst_scale) {
  const int64_t dst_step = move.dst.at.stride_dim * dtype_bytes(move.dst.dtype);
  float values[kVector];
  float scale = 1.0f;
  if (move.dst.token_scale) {
    float amax = 0.0f;
    for (int64_t i = group.lane * kVector; i < move.dims; i += kLanes * kVector) {
      const int count = move.dims - i < kVector ? static_cast<int>(move.dims - i) : kVector;
      row.load(i, count, values);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (j >= count) break;
        const float value = src_scale == 1.0f ? values[j] : values[j] * src_scale;
        const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
        if (magnitude < 0x7f800000u) amax = fmaxf(amax, float_from_bits(magnitude));
      }
    }
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      amax = fmaxf(amax, group.exchange(amax, distance));
    }
    scale = dynamic_scale(amax, move.dst.dtype);
    if (group.lane == 0) *dst_scale = scale;
  } else if (dst_scale) {
    scale = *dst_scale;
  }
  for (int64_t i = group.lane * kVector; i < move.dims; i += kLanes * kVector) {
    const int count = move.dims - i < kVector ? static_cast<int>(move.dims - i) : kVector;
    row.load(i, count, values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (src_scale != 1.0f) values[j] *= src_scale;
      if (scale != 1.0f) values[j] = __fdiv_rn(values[j], scale);
    }
    store_values(move.dst.dtype, values, move.dst.at.stride_dim, count, dst + i * dst_step);
  }
}

// Word `idx` of a row's bytes, zero past their end.
__device__ inline uint64_t row_word(const char* row, int64_t idx, int64_t dims, int64_t stride,
                                    int64_t size) {
  const int64_t num_bytes = dims * size;
  if (stride == 1 && idx * 8 + 8 <= num_bytes && reinterpret_cast<uintptr_t>(row) % 8 == 0) {
    return reinterpret_cast<const uint64_t*>(row)[idx];
  }
  uint64_t word = 0;
  for (int64_t byte = idx * 8; byte < idx * 8 + 8 && byte < num_bytes; ++byte) {
    const char* at = row + byte / size * stride * size + byte % size;
    word |= static_cast<uint64_t>(static_cast<uint8_t>(*at)) << (byte % 8 * 8);
  }
  return word;
}

// What this lane adds to the digest of the destination row.
template <int kLanes>
__device__ uint64_t digest_row(const Group<kLanes>& group, const LayerMove& layer,
                               const RowPlace& place, int32_t model_head, int64_t position) {
  static_assert(kLanes >= row_digest::kLanes);
  const RowMove& move = layer.all;
  const int64_t size = dtype_bytes(move.dst.dtype);
  const char* row = layer.dst_row(place);
  const int64_t num_words = (move.dims * size + row_digest::kStripeBytes - 1) /
                            row_digest::kStripeBytes * row_digest::kLanes;
  // Lane l has words l, l + kLanes, ..., which all belong to digest lane l % 8.
  const int j = group.lane % row_digest::kLanes;
  uint64_t products = 0, words = 0;
  for (int64_t i = group.lane; i < num_words; i += kLanes) {
    const uint64_t word = row_word(row, i, move.dims, move.dst.at.stride_dim, size);
    const uint64_t stripe = static_cast<uint64_t>(i / row_digest::kLanes);
    const uint64_t x = word ^ (row_digest::key(j) + stripe * row_digest::kStep);
    products += (x & 0xffffffffu) * (x >> 32);
    words += word;
  }
  for (int distance = row_digest::kLanes; distance < kLanes; distance *= 2) {
    products += group.exchange(products, distance);
    words += group.exchange(words, distance);
  }
  const uint64_t acc = products + group.exchange(words, 1);
  if (group.lane >= row_digest::kLanes) return 0;
  uint64_t shift = row_digest::shift(position);
  if (move.dst.token_scale) {
    const float scale = *layer.dst_row_scale(place);
    shift += row_digest::scale_shift(float_bits(scale));
  }
  const uint64_t base =
      row_digest::base(layer.at.model_layer, model_head, move.model_plane, move.dims * size);
  return row_digest::finish(acc, row_digest::start(base, j), shift);
}

template <int kLanes>
__device__ void move_row(const Group<kLanes>& group, const LayerMove& layer,
                         const RowPlace& place) {
  const RowMove& move = layer.all;
  const char* src = layer.src_row(place);
  char* dst = layer.dst_row(place);
  const float* given = layer.src_row_scale(place);
  const float src_scale = given ? *given : 1.0f;
  float* dst_scale = layer.dst_row_scale(place);
  const bool same_kind =
      move.src.dtype == move.dst.dtype && move.src.token_scale == move.dst.token_scale;
  if (same_kind && (move.src.token_scale || src_scale == (dst_scale ? *dst_scale : 1.0f))) {
    copy_row(group, move, src, dst);
    if (move.src.token_scale && group.lane == 0) *dst_scale = src_scale;
  } else {
    convert_row(group, move, PlainRow{move, src}, src_scale, dst, dst_scale);
  }
}

// Source rows are of a float dtype without scales. `cos`: the token's row of the table.
template <int kLanes>
__device__ void turn_row(const Group<kLanes>& group, const LayerMove& layer, const RowPlace& place,
                         const RopeParams& rope, const float* cos) {
  const TurnedRow row{{layer.all, layer.src_row(place)}, rope, cos};
  convert_row(group, layer.all, row, 1.0f, layer.dst_row(place), layer.dst_row_scale(place));
}

// Lanes that a row of this many bytes keeps busy with 16 bytes each: 8, 16 or 32.
inline int group_lanes(int64_t row_bytes) {
  return row_bytes <= 128 ? 8 : row_bytes <= 256 ? 16 : 32;
}

}  // namespace kvlink::cuda
