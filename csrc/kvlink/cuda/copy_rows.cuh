// Rows that keep their bytes: what append_kv and relayout_pages mostly move. A thread copies 16
// bytes of each of several rows, all on their way at once: memory is kept busy by bytes in flight,
// of which move_row has 16 a thread and few threads.
#pragma once

#include <algorithm>

#include "kvlink/base/math.hpp"
#include "kvlink/cuda/move_rows.cuh"

namespace kvlink::cuda {

inline constexpr int kCopyThreads = 256;
inline constexpr int kCopyResident = 3;     // blocks on a processor that registers must suffice for
inline constexpr uint32_t kCopiesEach = 4;  // of a thread, at once
inline constexpr int64_t kMostCopies = INT32_MAX;

// Divides numbers below 2^31 by one that is known beforehand.
struct Divisor {
  uint32_t value = 1, factor = 1, shift = 0;

  static Divisor of(int64_t value) {
    Divisor by{.value = static_cast<uint32_t>(value)};
    while (uint64_t{1} << by.shift < by.value) ++by.shift;
    const uint64_t rest = (uint64_t{1} << by.shift) - by.value;
    by.factor = static_cast<uint32_t>((rest << 32) / by.value + 1);
    return by;
  }
  __device__ uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
};

// The copies of each plane of a layer.
struct CopyShape {
  Divisor chunks[2];  // of 16 bytes, of a row
  Divisor num_heads;
  uint32_t num_rows = 0;
};

// Every row can be copied by 16 bytes, as it is.
inline bool copied_by_chunks(const std::vector<RowMove>& moves) {
  const auto aligned = [](const RowPlane& plane, int64_t dims) {
    const int64_t size = dtype_bytes(plane.dtype);
    const int64_t low_bits =
        (plane.at.stride_page | plane.at.stride_slot | plane.at.stride_head | dims) * size |
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(plane.data));
    return plane.at.stride_dim == 1 && !plane.scale && low_bits % 16 == 0;
  };
  return std::all_of(moves.begin(), moves.end(), [&](const RowMove& move) {
    return move.src.dtype == move.dst.dtype && move.dims > 0 && aligned(move.src, move.dims) &&
           aligned(move.dst, move.dims);
  });
}

// Of the moves of one launch. False: there are too many for 32 bits.
inline bool make_copy_shape(const LayerMoves& moves, int64_t num_rows, int64_t num_heads,
                            CopyShape* shape) {
  for (int plane = 0; plane < moves.num_planes; ++plane) {
    const RowMove& move = moves.planes[plane];
    const int64_t chunks = move.dims * dtype_bytes(move.dst.dtype) / 16;
    if (num_rows > kMostCopies / chunks) return false;
    shape->chunks[plane] = Divisor::of(chunks);
  }
  shape->num_heads = Divisor::of(num_heads);
  shape->num_rows = static_cast<uint32_t>(num_rows);
  return true;
}

inline unsigned num_copy_blocks(const CopyShape& shape) {
  const int64_t most = std::max(shape.chunks[0].value, shape.chunks[1].value);
  return static_cast<unsigned>(
      ceil_div(shape.num_rows * most, int64_t{kCopyThreads} * kCopiesEach));
}

// Grid: copies in x, planes of layers in y. `find.ids(token)` loads what tells where a token's rows
// are; `find.place(ids, token, head, reports, &place)` is false for rows that are not moved.
template <typename Find>
__device__ void copy_rows(const LayerMoves& moves, const CopyShape& shape, const Find& find) {
  const LayerMove move = moves.of(static_cast<int>(blockIdx.y));
  const Divisor& chunks = shape.chunks[static_cast<int>(blockIdx.y) % moves.num_planes];
  const uint32_t total = shape.num_rows * chunks.value;
  const uint32_t first = blockIdx.x * (kCopyThreads * kCopiesEach) + threadIdx.x;
  if (first >= total) return;
  uint32_t rows[kCopiesEach], parts[kCopiesEach], tokens[kCopiesEach];
  typename Find::Ids ids[kCopiesEach];
#pragma unroll
  for (uint32_t i = 0; i < kCopiesEach; ++i) {
    const uint32_t idx = first + i * kCopyThreads < total ? first + i * kCopyThreads : first;
    rows[i] = chunks.divide(idx);
    parts[i] = idx - rows[i] * chunks.value;
    tokens[i] = shape.num_heads.divide(rows[i]);
    ids[i] = find.ids(tokens[i]);
  }
  uint4 values[kCopiesEach];
  uint4* to[kCopiesEach];
#pragma unroll
  for (uint32_t i = 0; i < kCopiesEach; ++i) {
    const uint32_t head = rows[i] - tokens[i] * shape.num_heads.value;
    RowPlace place;
    const bool there = first + i * kCopyThreads < total &&
                       find.place(ids[i], tokens[i], head, parts[i] == 0, &place);
    to[i] = there ? reinterpret_cast<uint4*>(move.dst_row(place)) + parts[i] : nullptr;
    if (there) values[i] = reinterpret_cast<const uint4*>(move.src_row(place))[parts[i]];
  }
#pragma unroll
  for (uint32_t i = 0; i < kCopiesEach; ++i) {
    if (to[i]) *to[i] = values[i];
  }
}

}  // namespace kvlink::cuda
