// Rows whose values are written anew: loaded as float32, scaled, rounded, digested and stored a
// stripe of 64 destination bytes at a time, all in registers.
#include <cstring>
#include <utility>

#include "kvlink/base/convert.hpp"
#include "kvlink/cpu/move_rows.hpp"
#include "kvlink/cpu/simd/narrow.hpp"
#include "kvlink/cpu/simd/row_walk.hpp"
#include "kvlink/cpu/simd/strided.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// Bits of the largest magnitude among the finite values; bits order like the values.
template <DType kSrc>
uint32_t finite_amax_bits(const char* src, int64_t count, float scale) {
  constexpr int64_t kBytes = Row<kSrc>::kBytes;
  int64_t i = 0;
#if defined(__AVX512F__)
  if (kSrc == DType::kBFloat16 && scale == 1.0f && count >= 32) {  // the upper halves will do
    __m512i amax16 = _mm512_setzero_si512();
    for (; i + 32 <= count; i += 32) {
      const __m512i bits =
          _mm512_and_si512(_mm512_loadu_si512(src + i * kBytes), _mm512_set1_epi16(0x7fff));
      const __mmask32 finite = _mm512_cmplt_epu16_mask(bits, _mm512_set1_epi16(0x7f80));
      amax16 = _mm512_mask_max_epu16(amax16, finite, amax16, bits);
    }
    const __m256i half =
        _mm256_max_epu16(_mm512_castsi512_si256(amax16), _mm512_extracti64x4_epi64(amax16, 1));
    const __m128i quarter =
        _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i ones = _mm_set1_epi16(-1);
    const auto most =
        static_cast<uint32_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0));
    const uint32_t bits = (most ^ 0xffffu) << 16;
    if (i == count) return bits;
    const uint32_t rest = finite_amax_bits<kSrc>(src + i * kBytes, count - i, scale);
    return bits < rest ? rest : bits;
  }
#endif
  VecI amax{};
  const auto take = [&](Vec values) {
    if (scale != 1.0f) values *= scale;
    const VecI magnitude = (VecI)(bits_of(values) & 0x7fffffffu);
    const VecI finite = magnitude < 0x7f800000 ? magnitude : VecI{};
    amax = finite > amax ? finite : amax;
  };
  for (; i + kLanes <= count; i += kLanes) take(Row<kSrc>::load(src + i * kBytes));
  if (i < count) take(load_some<kSrc>(src + i * kBytes, count - i));
  uint32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto each = static_cast<uint32_t>(amax[lane]);
    most = most < each ? each : most;
  }
  return most;
}

// One stripe of the destination: 64 / kBytes of its elements.
template <DType kSrc, DType kDst>
KVLINK_INLINE Words convert_stripe(const char* src, float src_scale, float dst_scale) {
  constexpr int kVecs = 64 / Row<kDst>::kBytes / kLanes;
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

// Elements that lie one after the other on both sides, `count` of them.
template <DType kSrc, DType kDst>
KVLINK_INLINE void convert_run(const char* src, float src_scale, char* dst, float dst_scale,
                               int64_t count, bool streaming, RowLanes& lanes) {
  constexpr int64_t kElements = 64 / Row<kDst>::kBytes;
  int64_t i = 0;
  for (; i + kElements <= count; i += kElements) {
    const Words words =
        convert_stripe<kSrc, kDst>(src + i * Row<kSrc>::kBytes, src_scale, dst_scale);
    if (streaming) {
      words.stream(dst + i * Row<kDst>::kBytes);
    } else {
      words.store(dst + i * Row<kDst>::kBytes);
    }
    lanes.stripe(words);
  }
  if (i == count) return;
  char padded[kElements * Row<kSrc>::kBytes] = {};
  std::memcpy(padded, src + i * Row<kSrc>::kBytes,
              static_cast<size_t>((count - i) * Row<kSrc>::kBytes));
  alignas(64) char last[64];
  convert_stripe<kSrc, kDst>(padded, src_scale, dst_scale).store(last);
  const Words words = Words::load_some(last, (count - i) * Row<kDst>::kBytes);
  words.store_some(dst + i * Row<kDst>::kBytes, (count - i) * Row<kDst>::kBytes);
  lanes.stripe(words);
}

// One row of a move, whose elements need not be contiguous.
template <DType kSrc, DType kDst>
struct Converter {
  int64_t dims, src_step, dst_step;  // steps in bytes
  bool strided, streaming;

  explicit Converter(const RowMove& move)
      : dims(move.dims),
        src_step(move.src.at.stride_dim * Row<kSrc>::kBytes),
        dst_step(move.dst.at.stride_dim * Row<kDst>::kBytes),
        strided(is_strided(move.src, dims) || is_strided(move.dst, dims)),
        streaming(can_stream(move)) {}

  uint32_t amax_bits(const char* src, float scale) const {
    if (!strided) return finite_amax_bits<kSrc>(src, dims, scale);
    uint32_t most = 0;
    for_each_chunk(src, [&](const char* chunk, int64_t, int64_t count) {
      const uint32_t bits = finite_amax_bits<kSrc>(chunk, count, scale);
      most = most < bits ? bits : most;
    });
    return most;
  }

  KVLINK_INLINE void convert(const char* src, float src_scale, char* dst, float dst_scale,
                             RowLanes& lanes) const {
    if (!strided) {
      convert_run<kSrc, kDst>(src, src_scale, dst, dst_scale, dims, streaming, lanes);
    } else {
      convert_strided(src, src_scale, dst, dst_scale, lanes);
    }
  }

 private:
  __attribute__((noinline)) void convert_strided(const char* src, float src_scale, char* dst,
                                                 float dst_scale, RowLanes& lanes) const {
    for_each_chunk(src, [&](const char* chunk, int64_t first, int64_t count) {
      alignas(64) char narrowed[kStridedChunk * Row<kDst>::kBytes];
      convert_run<kSrc, kDst>(chunk, src_scale, narrowed, dst_scale, count, false, lanes);
      copy_elements(dst + first * dst_step, dst_step, narrowed, Row<kDst>::kBytes, count,
                    Row<kDst>::kBytes);
    });
  }

  template <typename Function>
  KVLINK_INLINE void for_each_chunk(const char* src, const Function& function) const {
    alignas(64) char chunk[kStridedChunk * Row<kSrc>::kBytes];
    for (int64_t i = 0; i < dims; i += kStridedChunk) {
      const int64_t count = dims - i < kStridedChunk ? dims - i : kStridedChunk;
      copy_elements(chunk, Row<kSrc>::kBytes, src + i * src_step, src_step, count,
                    Row<kSrc>::kBytes);
      function(chunk, i, count);
    }
  }
};

// Stored bytes of a row that does not change; whole stripes of elements on either side.
template <DType kDType>
void keep_row(const RowMove& move, const char* src, char* dst, RowLanes& lanes) {
  constexpr int64_t kBytes = Row<kDType>::kBytes;
  const int64_t src_step = move.src.at.stride_dim * kBytes;
  const int64_t dst_step = move.dst.at.stride_dim * kBytes;
  alignas(64) char chunk[kStridedChunk * kBytes];
  for (int64_t i = 0; i < move.dims; i += kStridedChunk) {
    const int64_t count = move.dims - i < kStridedChunk ? move.dims - i : kStridedChunk;
    copy_elements(chunk, kBytes, src + i * src_step, src_step, count, kBytes);
    copy_elements(dst + i * dst_step, dst_step, chunk, kBytes, count, kBytes);
    lanes.bytes(chunk, count * kBytes);
  }
}

template <DType kSrc, DType kDst>
uint64_t convert_heads(const RowMove& move, const RowBox* boxes, int64_t num_boxes) {
  const Converter<kSrc, kDst> converter(move);
  const HeadStarts starts(move);
  DigestSum sum;
  // Rows whose static scales happen to agree keep their bytes.
  const bool may_keep = kSrc == kDst && !move.src.token_scale && !move.dst.token_scale;
  RowWalk<false> walk(move, boxes, num_boxes, false);
  FetchAhead<false> ahead(walk);
  for (; !walk.done(); walk.next()) {
    if (!converter.strided) ahead.bytes(walk.src_bytes());
    const RowBox& box = walk.box();
    const int64_t token = walk.token(), head = walk.head();
    float src_scale = 1.0f, dst_scale = 1.0f;
    if (move.src.scale) {
      src_scale = *move.src.row_scale(box.src_page, box.src_slot + token, move.src_head + head);
    }
    if (move.dst.scale) {
      float* at = move.dst.row_scale(box.dst_page, box.dst_slot + token, move.dst_head + head);
      if (move.dst.token_scale) {
        const uint32_t amax = converter.amax_bits(walk.src(), src_scale);
        *at = dynamic_scale(float_from_bits(amax), kDst);
      }
      dst_scale = *at;
    }
    RowLanes lanes;
    if (may_keep && src_scale == dst_scale) {
      keep_row<kDst>(move, walk.src(), walk.dst(), lanes);
    } else {
      converter.convert(walk.src(), src_scale, walk.dst(), dst_scale, lanes);
    }
    if (move.with_digest) {
      sum.add_row(lanes.acc(), starts[head], digest_shift(move, walk));
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
