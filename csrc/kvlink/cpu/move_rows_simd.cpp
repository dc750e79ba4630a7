// Rows whose stored bytes stay as they are, and digests of rows at rest.
#include <cstring>

#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/row_walk.hpp"
#include "kvlink/cpu/simd/strided.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// --- copying --------------------------------------------------------------------------------

struct Axis {
  int64_t size, src, dst;  // strides in bytes
};

// Copies a box of elements, the axis of the smallest steps innermost.
void copy_box(char* dst, const char* src, const Axis (&given)[3], int64_t element_bytes) {
  Axis axes[3] = {given[0], given[1], given[2]};
  const auto outside = [](const Axis& a, const Axis& b) {
    return a.size == 1 || (b.size != 1 && a.dst > b.dst);
  };
  const auto order = [&](Axis& a, Axis& b) {
    if (outside(a, b)) return;
    const Axis kept = a;
    a = b;
    b = kept;
  };
  order(axes[0], axes[1]);
  order(axes[1], axes[2]);
  order(axes[0], axes[1]);
  for (int64_t i = 0; i < axes[0].size; ++i) {
    for (int64_t j = 0; j < axes[1].size; ++j) {
      copy_elements(dst + i * axes[0].dst + j * axes[1].dst, axes[2].dst,
                    src + i * axes[0].src + j * axes[1].src, axes[2].src, axes[2].size,
                    element_bytes);
    }
  }
}

void copy_scales(const RowMove& move, const RowBox& box) {
  const RowPlane& src = move.src;
  const RowPlane& dst = move.dst;
  copy_box(reinterpret_cast<char*>(dst.row_scale(box.dst_page, box.dst_slot, move.dst_head)),
           reinterpret_cast<const char*>(src.row_scale(box.src_page, box.src_slot, move.src_head)),
           {{box.num_tokens, src.scale_at.stride_slot * 4, dst.scale_at.stride_slot * 4},
            {move.num_heads, src.scale_at.stride_head * 4, dst.scale_at.stride_head * 4},
            {1, 4, 4}},
           4);
}

void copy_strided(const RowMove& move, const RowBox& box) {
  const RowPlane& src = move.src;
  const RowPlane& dst = move.dst;
  const int64_t size = dtype_bytes(dst.dtype);
  copy_box(dst.row(box.dst_page, box.dst_slot, move.dst_head),
           src.row(box.src_page, box.src_slot, move.src_head),
           {{box.num_tokens, src.at.stride_slot * size, dst.at.stride_slot * size},
            {move.num_heads, src.at.stride_head * size, dst.at.stride_head * size},
            {move.dims, src.at.stride_dim * size, dst.at.stride_dim * size}},
           size);
}

enum class Write { kNothing, kStore, kStream };

// Those of each stripe of a row.
template <int kStripes>
class RowKeys {
 public:
  KVLINK_INLINE RowKeys() {
    keys_[0] = Words::load(kFirstKeys);
    for (int i = 1; i < kStripes; ++i) {
      for (int j = 0; j < kWordParts; ++j) {
        keys_[i].part[j] = keys_[i - 1].part[j] + row_digest::kStep;
      }
    }
  }
  KVLINK_INLINE const Words& operator[](int stripe) const { return keys_[stripe]; }

 private:
  Words keys_[kStripes];
};

// Rows of kStripes whole stripes, digested as they are copied or, with kNothing, as they lie.
template <Write kWrite, int kStripes>
uint64_t digest_whole_rows(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const HeadStarts starts(move);
  const RowKeys<kStripes> keys;
  DigestSum sum;
  RowWalk<false> walk(move, boxes, num_boxes, kWrite == Write::kNothing);
  FetchAhead<false> ahead(walk);
  while (!walk.done()) {
    const int64_t num_rows = walk.line_rows();
    const bool heads = walk.heads_inside();
    const char* src = walk.src();
    char* dst = walk.dst();
    const int64_t src_step = walk.src_step(), dst_step = walk.dst_step();
    const Words* start = &starts.of(walk.plane(), walk.head());
    const int64_t start_step = heads ? 1 : 0;
    uint64_t shift = row_digest::shift(walk.box().token_position + walk.token());
    const uint64_t shift_step = heads ? 0 : row_digest::shift(1);
    const float* scale = nullptr;
    int64_t scale_step = 0;
    if (move.dst.token_scale) {
      const RowBox& box = walk.box();
      scale = move.dst.row_scale(box.dst_page, box.dst_slot + walk.token(),
                                 move.dst_head + walk.head());
      scale_step = heads ? move.dst.scale_at.stride_head : move.dst.scale_at.stride_slot;
    }
    walk.skip(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) {
      ahead.stripes<kStripes>();
      LaneSums lanes;
      KVLINK_UNROLL
      for (int j = 0; j < kStripes; ++j) {
        const Words words = Words::load(src + 64 * j);
        if (kWrite == Write::kStore) words.store(dst + 64 * j);
        if (kWrite == Write::kStream) words.stream(dst + 64 * j);
        lanes.add(words, keys[j]);
      }
      uint64_t row_shift = shift;
      if (scale) {
        row_shift += row_digest::scale_shift(float_bits(*scale));
        scale += scale_step;
      }
      sum.add_row(lanes.acc(), *start, row_shift);
      src += src_step;
      dst += dst_step;
      start += start_step;
      shift += shift_step;
    }
  }
  return sum.total();
}

// `pick`'s function of as many stripes as a row has, where that is a length that models have; null
// for others.
template <typename Pick>
RowFunction* by_stripes(int64_t row_bytes, const Pick& pick) {
  switch (row_bytes) {
    case 64:
      return pick.template operator()<1>();
    case 128:
      return pick.template operator()<2>();
    case 256:
      return pick.template operator()<4>();
    case 512:
      return pick.template operator()<8>();
    default:
      return nullptr;
  }
}

template <Write kWrite>
RowFunction* whole_rows(int64_t row_bytes) {
  return by_stripes(row_bytes, []<int kStripes>() -> RowFunction* {
    return digest_whole_rows<kWrite, kStripes>;
  });
}

// Whether the rows of a plane of each box are one run of whole stripes on both sides, and short
// ones by the first box: a longer one among the others is only fetched further ahead.
bool has_short_runs(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const auto follow = [&](const Plane& at) {
    return at.stride_slot == move.num_heads * move.dims &&
           (move.num_heads == 1 || at.stride_head == move.dims);
  };
  return num_boxes > 0 && boxes->num_tokens * token_bytes(move) <= kShortBytes &&
         move.dims * dtype_bytes(move.dst.dtype) % 64 == 0 && !move.dst.token_scale &&
         follow(move.src.at) && follow(move.dst.at);
}

// Copies short runs: rows of kStripes stripes that are digested, or single stripes that are not.
// With each line the one is fetched that lies as far on in a box ahead, so that nothing has to be
// found out between them.
template <Write kWrite, int kStripes, bool kDigest>
uint64_t copy_short_runs(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const HeadStarts starts(move);
  const RowKeys<kStripes> keys;
  const int64_t box_bytes = boxes->num_tokens * token_bytes(move);
  const int64_t num_ahead = kFetchBytes > box_bytes ? kFetchBytes / box_bytes : 1;
  const int64_t num_heads = move.num_heads;
  const int64_t token_stripes = num_heads * move.dims * dtype_bytes(move.dst.dtype) / 64;
  PageTouches touches(move, boxes, num_boxes, false);
  DigestSum sum;
  for (int64_t i = -num_ahead; i < num_boxes; ++i) {
    const RowBox& next = boxes[i + num_ahead < num_boxes ? i + num_ahead : num_boxes - 1];
    touches.before(&next);
    for (int32_t plane = 0; plane < move.num_planes; ++plane) {
      const char* ahead =
          move.src.row(next.src_page, next.src_slot, move.src_head) + plane * move.src_plane_bytes;
      if (i < 0) {
        for (int64_t j = 0; j < next.num_tokens * token_stripes; ++j) {
          __builtin_prefetch(ahead + 64 * j);
        }
        continue;
      }
      const RowBox& box = boxes[i];
      const char* src =
          move.src.row(box.src_page, box.src_slot, move.src_head) + plane * move.src_plane_bytes;
      char* dst =
          move.dst.row(box.dst_page, box.dst_slot, move.dst_head) + plane * move.dst_plane_bytes;
      uint64_t shift = row_digest::shift(box.token_position);
      const auto take = [&](const Words& start) __attribute__((always_inline)) {
        LaneSums lanes;
        KVLINK_UNROLL
        for (int j = 0; j < kStripes; ++j) {
          __builtin_prefetch(ahead + 64 * j);
          const Words words = Words::load(src + 64 * j);
          kWrite == Write::kStream ? words.stream(dst + 64 * j) : words.store(dst + 64 * j);
          if (kDigest) lanes.add(words, keys[j]);
          // NOTE: four lines fetched and then four copied, as the compiler has it, are slower.
          asm volatile("" ::: "memory");
        }
        if (kDigest) sum.add_row(lanes.acc(), start, shift);
        src += 64 * kStripes;
        dst += 64 * kStripes;
        ahead += 64 * kStripes;
      };
      const Words first = starts.of(plane, 0);
      if (!kDigest) {
        for (int64_t left = box.num_tokens * token_stripes; left > 0; --left) take(first);
        continue;
      }
      for (int64_t left = box.num_tokens; left > 0; --left, shift += row_digest::shift(1)) {
        take(first);
        for (int64_t head = 1; head < num_heads; ++head) take(starts.of(plane, head));
      }
    }
  }
  return sum.total();
}

// The same, digested, where the row's length is one of those.
template <Write kWrite>
RowFunction* short_runs(int64_t row_bytes) {
  return by_stripes(row_bytes, []<int kStripes>() -> RowFunction* {
    return copy_short_runs<kWrite, kStripes, true>;
  });
}

void copy_runs(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const bool streaming = can_stream(move);
  if (has_short_runs(move, boxes, num_boxes)) {
    streaming ? copy_short_runs<Write::kStream, 1, false>(move, boxes, num_boxes)
              : copy_short_runs<Write::kStore, 1, false>(move, boxes, num_boxes);
    return;
  }
  RowLanes none;
  RowWalk<true> walk(move, boxes, num_boxes, false);
  FetchAhead<true> ahead(walk);
  for (; !walk.done(); walk.next()) {
    copy_run<false>(walk.dst(), walk.src(), walk.dst_bytes(), streaming, ahead, none);
  }
}

uint64_t copy_and_digest(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const bool streaming = can_stream(move);
  const int64_t row_bytes = move.dims * dtype_bytes(move.dst.dtype);
  if (has_short_runs(move, boxes, num_boxes)) {
    if (auto* runs = streaming ? short_runs<Write::kStream>(row_bytes)
                               : short_runs<Write::kStore>(row_bytes)) {
      return runs(move, boxes, num_boxes);
    }
  }
  if (auto* whole = streaming ? whole_rows<Write::kStream>(row_bytes)
                              : whole_rows<Write::kStore>(row_bytes)) {
    return whole(move, boxes, num_boxes);
  }
  const HeadStarts starts(move);
  DigestSum sum;
  RowWalk<false> walk(move, boxes, num_boxes, false);
  FetchAhead<false> ahead(walk);
  for (; !walk.done(); walk.next()) {
    RowLanes lanes;
    copy_run<true>(walk.dst(), walk.src(), walk.dst_bytes(), streaming, ahead, lanes);
    sum.add_row(lanes.acc(), starts.of(walk.plane(), walk.head()), digest_shift(move, walk));
  }
  return sum.total();
}

// --- digesting ------------------------------------------------------------------------------

void digest_strided(const RowMove& move, const char* row, RowLanes& lanes) {
  const int64_t size = dtype_bytes(move.dst.dtype);
  const int64_t step = move.dst.at.stride_dim * size;
  alignas(64) char gathered[kStridedChunk * 4];
  for (int64_t i = 0; i < move.dims; i += kStridedChunk) {
    const int64_t count = move.dims - i < kStridedChunk ? move.dims - i : kStridedChunk;
    copy_elements(gathered, size, row + i * step, step, count, size);
    lanes.bytes(gathered, count * size);
  }
}

uint64_t digest_heads(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const bool strided = is_strided(move.dst, move.dims);
  auto* whole = whole_rows<Write::kNothing>(move.dims * dtype_bytes(move.dst.dtype));
  if (whole && !strided) return whole(move, boxes, num_boxes);
  const HeadStarts starts(move);
  DigestSum sum;
  RowWalk<false> walk(move, boxes, num_boxes, true);
  FetchAhead<false> ahead(walk);
  for (; !walk.done(); walk.next()) {
    RowLanes lanes;
    if (strided) {
      digest_strided(move, walk.dst(), lanes);
    } else {
      ahead.bytes(walk.dst_bytes());
      lanes.bytes(walk.dst(), walk.dst_bytes());
    }
    sum.add_row(lanes.acc(), starts.of(walk.plane(), walk.head()), digest_shift(move, walk));
  }
  return sum.total();
}

uint64_t copy_rows(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  if (move.dst.token_scale) {
    for (int64_t i = 0; i < num_boxes; ++i) copy_scales(move, boxes[i]);
  }
  if (is_strided(move.src, move.dims) || is_strided(move.dst, move.dims)) {
    for (int64_t i = 0; i < num_boxes; ++i) copy_strided(move, boxes[i]);
    return move.with_digest ? digest_rows(move, boxes, num_boxes) : 0;
  }
  if (!move.with_digest) {
    copy_runs(move, boxes, num_boxes);
    return 0;
  }
  return for_each_heads(
      move, [&](const RowMove& part) { return copy_and_digest(part, boxes, num_boxes); });
}

}  // namespace

uint64_t digest_rows(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  return for_each_heads(move,
                        [&](const RowMove& part) { return digest_heads(part, boxes, num_boxes); });
}

uint64_t move_rows(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const uint64_t digest =
      move.verbatim ? copy_rows(move, boxes, num_boxes) : convert_rows(move, boxes, num_boxes);
  if (move.streaming) finish_streams();
  return digest;
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
