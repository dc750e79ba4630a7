// Rows whose values are written anew: loaded as float32, scaled, rounded, digested and stored a
// stripe of 64 destination bytes at a time, all in registers.
#include <cstring>
#include <utility>

#include "kvlink/base/convert.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/quantise.hpp"
#include "kvlink/cpu/simd/row_walk.hpp"
#include "kvlink/cpu/simd/strided.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

#if defined(__AVX512F__)
// Of bfloat16, whose upper halves will do: infinity's bits or more where not all are finite.
KVLINK_INLINE uint32_t amax_bits_of_bfloat16(const char* src, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  int64_t i = 0;
  KVLINK_UNROLL_BY(2)
  for (; i + 32 <= count; i += 32) {
    most = _mm512_max_epu16(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(src + i * 2)));
  }
  if (i < count) {
    const __mmask32 rest = (uint32_t{1} << (count - i)) - 1;
    const __m512i stored = _mm512_maskz_loadu_epi16(rest, src + i * 2);
    most = _mm512_max_epu16(most, _mm512_and_si512(magnitude, stored));
  }
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
  return ~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) << 16;
}
#endif

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
    return convert_any<kSrc, kDst>(src, src_scale, dst_scale);
  }
}

// `count` elements that lie one after the other on both sides; `sink` gets each stripe, too.
template <DType kSrc, DType kDst, typename Sink>
KVLINK_INLINE void convert_run(const char* src, float src_scale, char* dst, float dst_scale,
                               int64_t count, bool streaming, const Sink& sink) {
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

// Rows that follow each other by constant steps, which are 0 where something stays the same.
struct Line {
  const char* src;
  char* dst;
  const float* src_scale;
  float* dst_scale;
  const Words* start;
  uint64_t shift;
  int64_t src_step, dst_step, src_scale_step, dst_scale_step, start_step;
  uint64_t shift_step;

  KVLINK_INLINE Line(const RowMove& move, const RowWalk<false>& walk, const HeadStarts& starts) {
    static constexpr float kOne = 1.0f;
    const RowBox& box = walk.box();
    const int64_t token = walk.token(), head = walk.head();
    const bool heads = walk.heads_inside();
    src = walk.src();
    dst = walk.dst();
    src_step = walk.src_step();
    dst_step = walk.dst_step();
    src_scale = &kOne;
    dst_scale = const_cast<float*>(&kOne);  // not written: there is no scale of a row's own
    src_scale_step = dst_scale_step = 0;
    if (move.src.scale) {
      src_scale = move.src.row_scale(box.src_page, box.src_slot + token, move.src_head + head);
      src_scale_step = heads ? move.src.scale_at.stride_head : move.src.scale_at.stride_slot;
    }
    if (move.dst.scale) {
      dst_scale = move.dst.row_scale(box.dst_page, box.dst_slot + token, move.dst_head + head);
      dst_scale_step = heads ? move.dst.scale_at.stride_head : move.dst.scale_at.stride_slot;
    }
    start = &starts[head];
    start_step = heads ? 1 : 0;
    shift = row_digest::shift(box.token_position + token);
    shift_step = heads ? 0 : row_digest::shift(1);
  }

  KVLINK_INLINE const char* src_row(int64_t i) const { return src + i * src_step; }
  KVLINK_INLINE char* dst_row(int64_t i) const { return dst + i * dst_step; }
  KVLINK_INLINE float src_scale_of(int64_t i) const { return src_scale[i * src_scale_step]; }
  KVLINK_INLINE float* dst_scale_of(int64_t i) const { return dst_scale + i * dst_scale_step; }
};

template <DType kSrc>
KVLINK_INLINE uint32_t row_amax_bits(const char* src, int64_t count, float scale) {
#if defined(__AVX512F__)
  if (kSrc == DType::kBFloat16 && scale == 1.0f) {
    const uint32_t bits = amax_bits_of_bfloat16(src, count);
    if (bits < 0x7f800000u) return bits;
  }
#endif
  return finite_amax_bits<kSrc>(src, count, scale);
}

constexpr int64_t kGroup = 8;          // rows of a line that are taken together
constexpr int64_t kStagedStripes = 8;  // of a row, at most

// Takes a few rows through one step after the other, so that the CPU always has as many of them
// under way as a step's latency asks for.
template <DType kSrc, DType kDst>
class GroupConverter {
 public:
  GroupConverter(const RowMove& move)
      : move_(move),
        strided_(is_strided(move.src, move.dims) || is_strided(move.dst, move.dims)),
        // Rows whose static scales happen to agree keep their bytes.
        may_keep_(kSrc == kDst && !move.src.token_scale && !move.dst.token_scale),
        streaming_(can_stream(move)),
        num_stripes_(ceil_div(move.dims, kStripeElements<kDst>)) {}

  KVLINK_INLINE void convert(const Line& line, int64_t first, int64_t count,
                             FetchAhead<false>& ahead, DigestSum& sum) {
    for (int64_t i = 0; i < count; ++i) scales_[i] = scale_row(line, first + i);
    if (strided_ || may_keep_ || !kStages || num_stripes_ > kStagedStripes) {
      for (int64_t i = 0; i < count; ++i) {
        if (!strided_) ahead.run();
        digest(line, first, i, convert_any_row(line, first + i, scales_[i]).acc(), sum);
      }
      return;
    }
    char* staged = staged_;
    const auto stage = [&](const Words& words) {
      words.store(staged);
      staged += sizeof(Words);
    };
    for (int64_t i = 0; i < count; ++i) {
      ahead.run();
      convert_run<kSrc, kDst>(line.src_row(first + i), line.src_scale_of(first + i),
                              line.dst_row(first + i), scales_[i], move_.dims, streaming_, stage);
    }
    if (!move_.with_digest) return;
    for (int64_t i = 0; i < count; ++i) {
      RowLanes lanes;
      lanes.bytes(staged_ + i * num_stripes_ * 64, num_stripes_ * 64);
      digest(line, first, i, lanes.acc(), sum);
    }
  }

 private:
  // The destination's scale of a row, computed and stored if it is the row's own.
  KVLINK_INLINE float scale_row(const Line& line, int64_t row) const {
    float* at = line.dst_scale_of(row);
    if (!move_.dst.token_scale) return *at;
    const char* src = line.src_row(row);
    const float src_scale = line.src_scale_of(row);
    const uint32_t amax = strided_ ? StridedRow(move_).amax_bits<kSrc>(src, src_scale)
                                   : row_amax_bits<kSrc>(src, move_.dims, src_scale);
    return *at = dynamic_scale(float_from_bits(amax), kDst);
  }

  RowLanes convert_any_row(const Line& line, int64_t row, float dst_scale) const {
    const char* src = line.src_row(row);
    char* dst = line.dst_row(row);
    const float src_scale = line.src_scale_of(row);
    if (may_keep_ && src_scale == dst_scale) return keep_row(move_, src, dst);
    if (strided_) return StridedRow(move_).convert<kSrc, kDst>(src, src_scale, dst, dst_scale);
    RowLanes lanes;
    convert_run<kSrc, kDst>(src, src_scale, dst, dst_scale, move_.dims, streaming_,
                            [&](const Words& words) { lanes.stripe(words); });
    return lanes;
  }

  KVLINK_INLINE void digest(const Line& line, int64_t first, int64_t i, const Words& acc,
                            DigestSum& sum) const {
    if (!move_.with_digest) return;
    uint64_t shift = line.shift + static_cast<uint64_t>(first + i) * line.shift_step;
    if (move_.dst.token_scale) shift += row_digest::scale_shift(float_bits(scales_[i]));
    sum.add_row(acc, line.start[(first + i) * line.start_step], shift);
  }

  static constexpr bool kStages = Row<kDst>::kBytes == 1;

  const RowMove& move_;
  const bool strided_, may_keep_, streaming_;
  const int64_t num_stripes_;
  float scales_[kGroup];
  alignas(64) char staged_[kGroup * kStagedStripes * 64];
};

template <DType kSrc, DType kDst>
uint64_t convert_heads(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  GroupConverter<kSrc, kDst> converter(move);
  const HeadStarts starts(move);
  DigestSum sum;
  RowWalk<false> walk(move, boxes, num_boxes, false);
  FetchAhead<false> ahead(walk);
  for (; !walk.done(); walk.next_line()) {
    const Line line(move, walk, starts);
    const int64_t num_rows = walk.line_rows();
    for (int64_t first = 0; first < num_rows; first += kGroup) {
      const int64_t count = num_rows - first < kGroup ? num_rows - first : kGroup;
      converter.convert(line, first, count, ahead, sum);
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
