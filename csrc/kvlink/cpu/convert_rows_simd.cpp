// Rows whose values are written anew: loaded as float32, scaled, rounded, digested and stored a
// stripe of 64 destination bytes at a time, all in registers.
#include <cstring>
#include <utility>

#include "kvlink/base/convert.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/quantise.hpp"
#include "kvlink/cpu/simd/row_walk.hpp"
#include "kvlink/cpu/simd/strided.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// Bits of the largest magnitude among the finite values; bits order like the values.
template <DType kSrc>
KVLINK_INLINE uint32_t finite_amax_bits(const char* src, int64_t count, float scale) {
  constexpr int64_t kBytes = Row<kSrc>::kBytes;
  VecI amax{};
  int64_t i = 0;
#if defined(__AVX512F__)
  if (kSrc == DType::kBFloat16 && scale == 1.0f) {  // the upper halves of floats will do
    __m512i halves = _mm512_setzero_si512();
    for (; i + 32 <= count; i += 32) {
      const __m512i stored = _mm512_loadu_si512(src + i * kBytes);
      const __m512i bits = _mm512_and_si512(stored, _mm512_set1_epi16(0x7fff));
      const __mmask32 finite = _mm512_cmplt_epu16_mask(bits, _mm512_set1_epi16(0x7f80));
      halves = _mm512_mask_max_epu16(halves, finite, halves, bits);
    }
    const __m256i most =
        _mm256_max_epu16(_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64(halves, 1));
    amax = (VecI)_mm512_slli_epi32(_mm512_cvtepu16_epi32(most), 16);
  }
#endif
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

// Elements of the destination in a stripe, and how many vectors they are.
template <DType kDst>
inline constexpr int kStripeElements = 64 / Row<kDst>::kBytes;
template <DType kDst>
inline constexpr int kStripeVecs = kStripeElements<kDst> / kLanes;

template <DType kSrc, DType kDst>
KVLINK_INLINE void load_stripe(const char* src, float src_scale, float dst_scale,
                               Vec (&values)[kStripeVecs<kDst>]) {
  KVLINK_UNROLL
  for (int i = 0; i < kStripeVecs<kDst>; ++i) {
    values[i] = Row<kSrc>::load(src + i * kLanes * Row<kSrc>::kBytes);
  }
  if (src_scale != 1.0f) {
    KVLINK_UNROLL
    for (int i = 0; i < kStripeVecs<kDst>; ++i) values[i] *= src_scale;
  }
  if (dst_scale != 1.0f) {
    KVLINK_UNROLL
    for (int i = 0; i < kStripeVecs<kDst>; ++i) values[i] /= dst_scale;
  }
}

struct Stripe {
  alignas(64) char bytes[64];
};

// Any values; `count` elements of a stripe, the rest of which is then not specified.
template <DType kSrc, DType kDst>
__attribute__((noinline)) Stripe convert_some(const char* src, float src_scale, float dst_scale,
                                              int64_t count) {
  char padded[kStripeElements<kDst> * Row<kSrc>::kBytes] = {};
  std::memcpy(padded, src, static_cast<size_t>(count * Row<kSrc>::kBytes));
  Vec values[kStripeVecs<kDst>];
  load_stripe<kSrc, kDst>(padded, src_scale, dst_scale, values);
  Stripe stripe;
  narrow<kDst>(values).store(stripe.bytes);
  return stripe;
}

// The next whole stripe.
template <DType kSrc, DType kDst>
KVLINK_INLINE Words convert_stripe(const char* src, float src_scale, float dst_scale,
                                   bool quantises) {
  Words words;
  if constexpr (kQuantises<kSrc, kDst>) {
    if (quantises && quantise_stripe<kDst>(src, dst_scale, words)) return words;
    return Words::load(
        convert_some<kSrc, kDst>(src, src_scale, dst_scale, kStripeElements<kDst>).bytes);
  } else {
    Vec values[kStripeVecs<kDst>];
    load_stripe<kSrc, kDst>(src, src_scale, dst_scale, values);
    return narrow<kDst>(values);
  }
}

// `count` elements that lie one after the other on both sides.
template <DType kSrc, DType kDst>
KVLINK_INLINE void convert_run(const char* src, float src_scale, char* dst, float dst_scale,
                               int64_t count, bool streaming, RowLanes& lanes) {
  const bool quantises = src_scale == 1.0f && quantises_by(dst_scale);
  int64_t i = 0;
  for (; i + kStripeElements<kDst> <= count; i += kStripeElements<kDst>) {
    const Words words =
        convert_stripe<kSrc, kDst>(src + i * Row<kSrc>::kBytes, src_scale, dst_scale, quantises);
    if (streaming) {
      words.stream(dst + i * Row<kDst>::kBytes);
    } else {
      words.store(dst + i * Row<kDst>::kBytes);
    }
    lanes.stripe(words);
  }
  if (i == count) return;
  const int64_t num_bytes = (count - i) * Row<kDst>::kBytes;
  const Stripe last =
      convert_some<kSrc, kDst>(src + i * Row<kSrc>::kBytes, src_scale, dst_scale, count - i);
  const Words words = Words::load_some(last.bytes, num_bytes);
  words.store_some(dst + i * Row<kDst>::kBytes, num_bytes);
  lanes.stripe(words);
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

struct RowScales {
  float src = 1.0f, dst = 1.0f;
};

// Computes a row's own scale, if it has one, and stores it.
template <DType kSrc, DType kDst>
KVLINK_INLINE RowScales scale_row(const RowMove& move, const RowWalk<false>& walk, bool strided) {
  const RowBox& box = walk.box();
  const int64_t token = walk.token(), head = walk.head();
  RowScales scales;
  if (move.src.scale) {
    scales.src = *move.src.row_scale(box.src_page, box.src_slot + token, move.src_head + head);
  }
  if (!move.dst.scale) return scales;
  float* at = move.dst.row_scale(box.dst_page, box.dst_slot + token, move.dst_head + head);
  if (move.dst.token_scale) {
    const uint32_t amax = strided ? StridedRow(move).amax_bits<kSrc>(walk.src(), scales.src)
                                  : finite_amax_bits<kSrc>(walk.src(), move.dims, scales.src);
    *at = dynamic_scale(float_from_bits(amax), kDst);
  }
  scales.dst = *at;
  return scales;
}

template <DType kSrc, DType kDst>
uint64_t convert_heads(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  constexpr int kRows = 8;  // scaled together, before they are converted: a scale takes its time
  const bool strided = is_strided(move.src, move.dims) || is_strided(move.dst, move.dims);
  const bool streaming = can_stream(move);
  // Rows whose static scales happen to agree keep their bytes.
  const bool may_keep = kSrc == kDst && !move.src.token_scale && !move.dst.token_scale;
  const HeadStarts starts(move);
  DigestSum sum;
  RowWalk<false> walk(move, boxes, num_boxes, false), scaling = walk;
  FetchAhead<false> ahead(walk);
  while (!walk.done()) {
    RowScales scales[kRows];
    int count = 0;
    for (; count < kRows && !scaling.done(); ++count, scaling.next()) {
      if (!strided) ahead.bytes(scaling.src_bytes());
      scales[count] = scale_row<kSrc, kDst>(move, scaling, strided);
    }
    for (int i = 0; i < count; ++i, walk.next()) {
      RowLanes lanes;
      if (may_keep && scales[i].src == scales[i].dst) {
        lanes = keep_row(move, walk.src(), walk.dst());
      } else if (strided) {
        lanes = StridedRow(move).convert<kSrc, kDst>(walk.src(), scales[i].src, walk.dst(),
                                                     scales[i].dst);
      } else {
        convert_run<kSrc, kDst>(walk.src(), scales[i].src, walk.dst(), scales[i].dst, move.dims,
                                streaming, lanes);
      }
      if (move.with_digest) {
        sum.add_row(lanes.acc(), starts[walk.head()], digest_shift(move, walk));
      }
    }
  }
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
