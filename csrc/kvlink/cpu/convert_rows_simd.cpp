// Rows whose values are written anew: loaded as float32, scaled, rounded, digested and stored a
// stripe of 64 destination bytes at a time, all in registers.
#include <cstring>
#include <type_traits>
#include <utility>

#include "kvlink/base/convert.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/quantise_rows.hpp"
#include "kvlink/cpu/simd/row_batch.hpp"
#include "kvlink/cpu/simd/row_walk.hpp"
#include "kvlink/cpu/simd/scale_lines.hpp"
#include "kvlink/cpu/simd/strided.hpp"
#include "kvlink/cpu/simd/widen.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// Bits of the largest magnitude among the finite values; bits order like the values.
template <DType kSrc>
uint32_t finite_amax_bits(const char* src, int64_t count, float scale) {
  constexpr int64_t kBytes = Row<kSrc>::kBytes;
  VecI amax{};
  int64_t i = 0;
  const auto take = [&](Vec values) {
    if (scale != 1.0f) values *= scale;
    const VecI magnitude = (VecI)(bits_of(values) & 0x7fffffffu);
#if defined(__AVX512F__)
    const __mmask16 finite =
        _mm512_cmplt_epi32_mask((__m512i)magnitude, _mm512_set1_epi32(0x7f800000));
    amax = (VecI)_mm512_mask_max_epi32((__m512i)amax, finite, (__m512i)amax, (__m512i)magnitude);
#else
    const VecI finite = magnitude < 0x7f800000 ? magnitude : VecI{};
    amax = finite > amax ? finite : amax;
#endif
  };
  for (; i + kLanes <= count; i += kLanes) take(Row<kSrc>::load(src + i * kBytes));
  if (i < count) take(load_some<kSrc>(src + i * kBytes, count - i));
  return float_bits(max_lanes((Vec)amax));
}

// Elements of the destination in a stripe.
template <DType kDst>
inline constexpr int kStripeElements = 64 / Row<kDst>::kBytes;

#if defined(__AVX2__)

template <DType kSrc, DType kDst>
KVLINK_INLINE Words convert_any(const char* src, float src_scale, float dst_scale) {
#if defined(__AVX512F__)
  if constexpr (kSrc == DType::kFloat8E4M3 && kDst == DType::kBFloat16) {
    const bool usual = (float_bits(src_scale) & 0x7fffffffu) < 0x70000000u;
    if (usual && dst_scale == 1.0f) return widen_e4m3(src, src_scale);
  }
#endif
  constexpr int kVecs = kStripeElements<kDst> / kLanes;
  Vec values[kVecs];
  KVLINK_UNROLL
  for (int i = 0; i < kVecs; ++i) {
    values[i] = Row<kSrc>::load(src + i * kLanes * Row<kSrc>::kBytes);
  }
  if (src_scale != 1.0f) {
    KVLINK_UNROLL
    for (int i = 0; i < kVecs; ++i) values[i] *= src_scale;
  }
  if (dst_scale != 1.0f) {
    KVLINK_UNROLL
    for (int i = 0; i < kVecs; ++i) values[i] /= dst_scale;
  }
  return narrow<kDst>(values);
}

#else

// Loops that any compiler makes vectors of, over the definitions themselves.
template <DType kSrc, DType kDst>
__attribute__((noinline)) Words convert_any(const char* src, float src_scale, float dst_scale) {
  float values[kStripeElements<kDst>];
  for (int i = 0; i < kStripeElements<kDst>; ++i) {
    typename Storage<kSrc>::Type stored;
    std::memcpy(&stored, src + i * sizeof stored, sizeof stored);
    values[i] = Storage<kSrc>::load(stored);
  }
  if (src_scale != 1.0f) {
    for (float& value : values) value *= src_scale;
  }
  if (dst_scale != 1.0f) {
    for (float& value : values) value /= dst_scale;
  }
  typename Storage<kDst>::Type narrowed[kStripeElements<kDst>];
  for (int i = 0; i < kStripeElements<kDst>; ++i) narrowed[i] = Storage<kDst>::store(values[i]);
  return Words::load(narrowed);
}

#endif

struct Stripe {
  alignas(64) char bytes[64];
};

// Any values; `count` elements of a stripe, the rest of which is then not specified.
template <DType kSrc, DType kDst>
__attribute__((noinline)) Stripe convert_some(const char* src, float src_scale, float dst_scale,
                                              int64_t count) {
  char padded[kStripeElements<kDst> * Row<kSrc>::kBytes] = {};
  std::memcpy(padded, src, static_cast<size_t>(count * Row<kSrc>::kBytes));
  Stripe stripe;
  convert_any<kSrc, kDst>(padded, src_scale, dst_scale).store(stripe.bytes);
  return stripe;
}

KVLINK_INLINE void put(const Words& words, char* dst, bool streaming) {
  if (streaming) {
    words.stream(dst);
  } else {
    words.store(dst);
  }
}

// `count` elements that lie one after the other on both sides; `sink` gets each stripe, too.
template <DType kSrc, DType kDst, typename Sink>
KVLINK_INLINE void convert_run(const char* src, float src_scale, char* dst, float dst_scale,
                               int64_t count, bool streaming, const Sink& sink) {
  int64_t i = 0;
  for (; i + kStripeElements<kDst> <= count; i += kStripeElements<kDst>) {
    const Words words = convert_any<kSrc, kDst>(src + i * Row<kSrc>::kBytes, src_scale, dst_scale);
    put(words, dst + i * Row<kDst>::kBytes, streaming);
    sink(words);
  }
  if (i == count) return;
  const int64_t num_bytes = (count - i) * Row<kDst>::kBytes;
  const Stripe last =
      convert_some<kSrc, kDst>(src + i * Row<kSrc>::kBytes, src_scale, dst_scale, count - i);
  const Words words = Words::load_some(last.bytes, num_bytes);
  words.store_some(dst + i * Row<kDst>::kBytes, num_bytes);
  sink(words);
}

// Rows whose elements do not lie one after the other, on one side or both.
struct StridedRow {
  int64_t dims, src_step, dst_step;  // steps in bytes

  explicit StridedRow(const RowMove& move)
      : dims(move.dims),
        src_step(move.src.at.stride_dim * dtype_bytes(move.src.dtype)),
        dst_step(move.dst.at.stride_dim * dtype_bytes(move.dst.dtype)) {}

  template <DType kSrc>
  uint32_t amax_bits(const char* src, float scale) const {
    uint32_t most = 0;
    for (int64_t i = 0; i < dims; i += kStridedChunk) {
      alignas(64) char chunk[kStridedChunk * Row<kSrc>::kBytes];
      const int64_t count = dims - i < kStridedChunk ? dims - i : kStridedChunk;
      copy_elements(chunk, Row<kSrc>::kBytes, src + i * src_step, src_step, count,
                    Row<kSrc>::kBytes);
      const uint32_t bits = finite_amax_bits<kSrc>(chunk, count, scale);
      most = most < bits ? bits : most;
    }
    return most;
  }

  template <DType kSrc, DType kDst>
  RowLanes convert(const char* src, float src_scale, char* dst, float dst_scale) const {
    RowLanes lanes;
    for (int64_t i = 0; i < dims; i += kStripeElements<kDst>) {
      const int64_t left = dims - i;
      const int64_t count = left < kStripeElements<kDst> ? left : kStripeElements<kDst>;
      char gathered[kStripeElements<kDst> * Row<kSrc>::kBytes];
      copy_elements(gathered, Row<kSrc>::kBytes, src + i * src_step, src_step, count,
                    Row<kSrc>::kBytes);
      const Stripe stripe = convert_some<kSrc, kDst>(gathered, src_scale, dst_scale, count);
      copy_elements(dst + i * dst_step, dst_step, stripe.bytes, Row<kDst>::kBytes, count,
                    Row<kDst>::kBytes);
      lanes.bytes(stripe.bytes, count * Row<kDst>::kBytes);
    }
    return lanes;
  }
};

// Stored bytes of a row that does not change.
__attribute__((noinline)) RowLanes keep_row(const RowMove& move, const char* src, char* dst) {
  const int64_t size = dtype_bytes(move.dst.dtype);
  const int64_t src_step = move.src.at.stride_dim * size;
  const int64_t dst_step = move.dst.at.stride_dim * size;
  alignas(64) char chunk[kStridedChunk * 4];
  RowLanes lanes;
  for (int64_t i = 0; i < move.dims; i += kStridedChunk) {
    const int64_t count = move.dims - i < kStridedChunk ? move.dims - i : kStridedChunk;
    copy_elements(chunk, size, src + i * src_step, src_step, count, size);
    copy_elements(dst + i * dst_step, dst_step, chunk, size, count, size);
    lanes.bytes(chunk, count * size);
  }
  return lanes;
}

// Scales of the heads of a plane; 1 where it has none, or one for every row.
void static_scales(const RowPlane& plane, int32_t first, int32_t count, float* scales) {
  for (int32_t i = 0; i < count; ++i) {
    scales[i] = plane.scale && !plane.token_scale ? *plane.row_scale(0, 0, first + i) : 1.0f;
  }
}

struct NoQuantiser {};

template <DType kSrc, DType kDst>
class Converter {
 public:
  // For `num_tokens` tokens.
  Converter(const RowMove& move, int64_t num_tokens)
      : move_(move),
        starts_(move),
        strided_(is_strided(move.src, move.dims) || is_strided(move.dst, move.dims)),
        // Rows whose static scales happen to agree keep their bytes.
        may_keep_(kSrc == kDst && !move.src.token_scale && !move.dst.token_scale),
        streaming_(can_stream(move)),
        quantises_(kQuantises<kSrc, kDst> && !strided_ && !move.src.scale),
        own_scales_(quantises_ && move.dst.token_scale && takes_rows(move.dims)),
        by_lines_(streaming_ && own_scales_ && move.dst.scale_at.stride_slot == 1) {
    static_scales(move.src, move.src_head, move.num_heads, src_scales_);
    static_scales(move.dst, move.dst_head, move.num_heads, dst_scales_);
    if constexpr (kQuantises<kSrc, kDst>) {
      if (by_lines_) scale_lines_.start(move.num_heads);
      if (move.dst.token_scale) return;
      quantiser_.set_scales(dst_scales_, 0, move.num_heads);
      if (quantises_ && num_tokens >= 16) {  // fewer are not worth the making
        coded_ = head_codes_.set(quantiser_, dst_scales_, move.num_heads);
      }
    }
  }

  bool has_own_scales() const { return own_scales_; }

  // Finds the destination's scales, where rows have their own.
  KVLINK_INLINE void prepare(const Rows& rows) {
    if (move_.dst.token_scale && rows.count > 0) find_scales(rows);
  }
  // `rows`, which are prepared; those of `ahead` are fetched on the way.
  KVLINK_INLINE void convert(const Rows& rows, const Rows& ahead, DigestSum& sum) {
    if constexpr (kQuantises<kSrc, kDst>) {
      if (quantises_) {
        uint32_t left = (uint32_t{1} << rows.count) - 1;
        if (own_scales_) {
          left = move_.dims != 128 ? quantise_own<0, false>(rows, ahead, sum)
                 : streaming_      ? quantise_own<2, true>(rows, ahead, sum)
                                   : quantise_own<2, false>(rows, ahead, sum);
        }
        if (left != 0) {
          left = move_.dims == 128  ? coded_ ? quantise<2, true>(rows, ahead, left, sum)
                                             : quantise<2, false>(rows, ahead, left, sum)
                 : move_.dims == 64 ? coded_ ? quantise<1, true>(rows, ahead, left, sum)
                                             : quantise<1, false>(rows, ahead, left, sum)
                 : coded_           ? quantise<0, true>(rows, ahead, left, sum)
                                    : quantise<0, false>(rows, ahead, left, sum);
        }
        for (; left != 0; left &= left - 1) convert_row(rows, __builtin_ctz(left), sum);
        return;
      }
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      if (!strided_ && i < ahead.count) {
        fetch(ahead.at[i], move_.dims, false);
        if (move_.dst.token_scale) __builtin_prefetch(ahead.at[i].dst_scale, 1);
      }
      convert_row(rows, i, sum);
    }
  }
  // After the last rows.
  void finish() {
    if constexpr (kQuantises<kSrc, kDst>) {
      if (by_lines_) scale_lines_.finish(move_.num_heads);
    }
  }

 private:
  // What a row will be read from and, now and then, a line of where it goes: a store around the
  // caches to a page of memory not used lately would wait for its address.
  static KVLINK_INLINE void fetch(const RowAt& row, int64_t dims, bool streaming) {
    for (int64_t i = 0; i < dims * Row<kSrc>::kBytes; i += 64) __builtin_prefetch(row.src + i);
    const int64_t in_page = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row.dst) % 2048);
    if (streaming && in_page < dims * Row<kDst>::kBytes) __builtin_prefetch(row.dst);
  }

  KVLINK_INLINE float src_scale(const Rows& rows, int64_t i) const {
    return move_.src.token_scale ? *rows.at[i].src_scale : src_scales_[rows.at[i].head];
  }
  KVLINK_INLINE int64_t dst_scale_index(const Rows& rows, int64_t i) const {
    return move_.dst.token_scale ? rows.scales + i : rows.at[i].head;
  }

  __attribute__((noinline)) void find_scales(const Rows& rows) {
    float* scales = dst_scales_ + rows.scales;
    uint32_t left = (uint32_t{1} << rows.count) - 1;
    if constexpr (kQuantises<kSrc, kDst>) {
      const auto src = [&](int64_t i) { return rows.at[i].src; };
      if (own_scales_) {
        left = move_.dims == 128
                   ? row_quantiser_.find_scales(src, rows.count, 128, rows.scales, scales)
                   : row_quantiser_.find_scales(src, rows.count, move_.dims, rows.scales, scales);
      } else if (quantises_) {
        left = move_.dims == 128 ? quantiser_.find_scales(src, rows.count, 128, scales)
                                 : quantiser_.find_scales(src, rows.count, move_.dims, scales);
      }
    }
    for (; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      const float scale = src_scale(rows, i);
      const uint32_t amax = strided_ ? StridedRow(move_).amax_bits<kSrc>(rows.at[i].src, scale)
                                     : finite_amax_bits<kSrc>(rows.at[i].src, move_.dims, scale);
      scales[i] = dynamic_scale(float_from_bits(amax), kDst);
    }
    put_scales(rows, scales);
    if constexpr (kQuantises<kSrc, kDst>) {
      if (quantises_ && !own_scales_) quantiser_.set_scales(scales, rows.scales, Rows::kMost);
    }
  }

  KVLINK_INLINE void put_scales(const Rows& rows, const float* scales) {
    if constexpr (kQuantises<kSrc, kDst>) {
      if (by_lines_) return scale_lines_.put(rows, scales);
    }
    for (int64_t i = 0; i < rows.count; ++i) *rows.at[i].dst_scale = scales[i];
  }

  static bool takes_rows([[maybe_unused]] int64_t dims) {
    if constexpr (kQuantises<kSrc, kDst>) return RowQuantiser<kDst>::takes(dims);
    return false;
  }

  // Rows that have scales of their own, and kStripes whole stripes, any number of them with 0.
  // Returns bits of the rows that are left to quantise(). kStreams is not looked at with 0.
  template <int kStripes, bool kStreams>
  __attribute__((noinline)) uint32_t quantise_own(const Rows& rows, const Rows& ahead,
                                                  DigestSum& total) {
    const int64_t dims = kStripes ? kStripes * 64 : move_.dims;
    const bool streaming = kStripes ? kStreams : streaming_, with_digest = move_.with_digest;
    const int64_t count = rows.count, num_ahead = ahead.count;
    const bool fetches_scales = !by_lines_;  // stores wait for each other
    const uint32_t fits = row_quantiser_.fits(rows.scales);
    DigestSum sum;
    uint32_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i < num_ahead) {
        fetch(ahead.at[i], dims, streaming);
        if (fetches_scales) __builtin_prefetch(ahead.at[i].dst_scale, 1);
      }
      const int64_t scale = rows.scales + i;
      if ((fits >> i & 1) == 0) {
        quantiser_.set_scales(dst_scales_ + scale, scale, 1);
        left |= uint32_t{1} << i;
        continue;
      }
      const typename RowQuantiser<kDst>::Row row(row_quantiser_, scale);
      const char* src = rows.at[i].src;
      char* dst = rows.at[i].dst;
      RowLanes lanes;
      KVLINK_UNROLL_BY(2)
      for (int64_t j = 0; j < dims; j += 64) {
        const Words words = row.stripe(src + j * 2);
        put(words, dst + j, streaming);
        lanes.stripe(words);
      }
      if (!with_digest) continue;
      sum.add_row(lanes.acc(), starts_[rows.at[i].head],
                  rows.at[i].shift + row_quantiser_.shift(scale));
    }
    total.add(sum);
    return left;
  }

  // Those of `rows` that `which` has bits of: of kStripes whole stripes, of any length with 0.
  // Returns bits of the rows that are left to convert_row(), for their scale or a value is not a
  // usual one. With kCoded there are codes of all heads.
  template <int kStripes, bool kCoded>
  __attribute__((noinline)) uint32_t quantise(const Rows& rows, const Rows& ahead, uint32_t which,
                                              DigestSum& total) const {
    const int64_t dims = kStripes ? kStripes * 64 : move_.dims;
    const bool streaming = streaming_, with_digest = move_.with_digest;
    const bool own_scales = move_.dst.token_scale;
    const int64_t count = rows.count, num_ahead = ahead.count;
    DigestSum sum;
    uint32_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i < num_ahead) fetch(ahead.at[i], dims, streaming);
      if ((which >> i & 1) == 0) continue;
      const int64_t scale = own_scales ? rows.scales + i : rows.at[i].head;
      const char* src = rows.at[i].src;
      char* dst = rows.at[i].dst;
      bool fits = quantiser_.can_divide(scale);
      RowLanes lanes;
      Words words;
      int64_t j = 0;
      KVLINK_UNROLL_BY(2)
      for (; j + 64 <= dims; j += 64) {
        if (!kCoded || !head_codes_.stripe(src + j * 2, scale, words)) {
          fits &= !(kCoded && kDst == DType::kInt8) && quantiser_.stripe(src + j * 2, scale, words);
        }
        put(words, dst + j, streaming);
        lanes.stripe(words);
      }
      if (kStripes == 0 && j < dims) {
        fits &= quantiser_.some(src + j * 2, dims - j, scale, words);
        words.store_some(dst + j, dims - j);
        lanes.stripe(words);
      }
      if (!fits) {
        left |= uint32_t{1} << i;
      } else if (with_digest) {
        sum.add_row(lanes.acc(), starts_[rows.at[i].head], shift(rows, i));
      }
    }
    total.add(sum);
    return left;
  }

  __attribute__((noinline)) void convert_row(const Rows& rows, int64_t i, DigestSum& sum) const {
    const char* src = rows.at[i].src;
    char* dst = rows.at[i].dst;
    const float from = src_scale(rows, i), to = dst_scales_[dst_scale_index(rows, i)];
    RowLanes lanes;
    if (may_keep_ && from == to) {
      lanes = keep_row(move_, src, dst);
    } else if (strided_) {
      lanes = StridedRow(move_).convert<kSrc, kDst>(src, from, dst, to);
    } else {
      convert_run<kSrc, kDst>(src, from, dst, to, move_.dims, streaming_,
                              [&](const Words& words) { lanes.stripe(words); });
    }
    if (move_.with_digest) sum.add_row(lanes.acc(), starts_[rows.at[i].head], shift(rows, i));
  }

  KVLINK_INLINE uint64_t shift(const Rows& rows, int64_t i) const {
    if (!move_.dst.token_scale) return rows.at[i].shift;
    return rows.at[i].shift + row_digest::scale_shift(float_bits(dst_scales_[rows.scales + i]));
  }

  const RowMove& move_;
  const HeadStarts starts_;
  const bool strided_, may_keep_, streaming_, quantises_, own_scales_, by_lines_;
  bool coded_ = false;
  // By head, or by row where rows have their own.
  float src_scales_[HeadStarts::kHeads], dst_scales_[HeadStarts::kHeads];
  std::conditional_t<kQuantises<kSrc, kDst>, Quantiser<kDst>, NoQuantiser> quantiser_;
  std::conditional_t<kQuantises<kSrc, kDst>, RowQuantiser<kDst>, NoQuantiser> row_quantiser_;
  std::conditional_t<kQuantises<kSrc, kDst>, HeadCodes<kDst>, NoQuantiser> head_codes_;
  std::conditional_t<kQuantises<kSrc, kDst>, ScaleLines, NoQuantiser> scale_lines_;
};

constexpr int64_t kRowsBytes = 4096;  // of the source, that are taken together

template <DType kSrc, DType kDst>
uint64_t convert_heads(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const int64_t fit = kRowsBytes / (move.dims * Row<kSrc>::kBytes);
  const int64_t most = fit < 1 ? 1 : fit < Rows::kMost ? fit : Rows::kMost;
  int64_t num_tokens = 0;
  for (int64_t i = 0; i < num_boxes; ++i) num_tokens += boxes[i].num_tokens;
  Converter<kSrc, kDst> converter(move, num_tokens);
  DigestSum sum;
  RowBatches batches(move, boxes, num_boxes);
  // The last of them is being fetched; one more where rows are looked at for their scales first.
  constexpr int kRing = 6;
  static_assert(kRing * Rows::kMost <= HeadStarts::kHeads);
  Rows rows[kRing];
  const int ring = converter.has_own_scales() ? kRing : kRing - 1;
  for (int i = 0; i < ring; ++i) rows[i].scales = i * Rows::kMost;
  for (int i = 0; i < ring - 1; ++i) batches.take(rows[i], most);
  converter.prepare(rows[0]);
  const auto after = [&](int i) { return i + 1 == ring ? 0 : i + 1; };
  for (int i = 0, ahead = ring - 1; rows[i].count != 0; ahead = i, i = after(i)) {
    // Scales are known a while before they are used, rows are in the caches before both.
    batches.take(rows[ahead], most);
    converter.prepare(rows[after(i)]);
    converter.convert(rows[i], rows[ahead], sum);
  }
  converter.finish();
  return sum.total();
}

// By dtype of the source and the destination; uint8 has no values, and host code refuses it.
constexpr int kNumValueDTypes = 6;
template <int... kCodes>
constexpr RowFunction* pick_conversion(int code, std::integer_sequence<int, kCodes...>) {
  constexpr RowFunction* kTable[] = {
      convert_heads<static_cast<DType>(kCodes / kNumValueDTypes),
                    static_cast<DType>(kCodes % kNumValueDTypes)>...};
  return kTable[code];
}

}  // namespace

uint64_t convert_rows(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const int code =
      static_cast<int>(move.src.dtype) * kNumValueDTypes + static_cast<int>(move.dst.dtype);
  RowFunction* convert =
      pick_conversion(code, std::make_integer_sequence<int, kNumValueDTypes * kNumValueDTypes>());
  return for_each_heads(move, [&](const RowMove& part) { return convert(part, boxes, num_boxes); });
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
