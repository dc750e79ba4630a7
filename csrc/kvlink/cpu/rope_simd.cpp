#include "kvlink/cpu/rope.hpp"
#include "kvlink/cpu/simd/rows.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// A product that is rounded before anything is added to it, as the definition has it.
template <typename V>
KVLINK_INLINE V rounded(V product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#else
  asm("" : "+w"(product));
#endif
  return product;
}

// The first and the second of pairs.
template <typename V>
KVLINK_INLINE void turn(V& a, V& b, V cos, V sin) {
  const V first = rounded(a * cos) - rounded(b * sin);
  b = rounded(b * cos) + rounded(a * sin);
  a = first;
}

void turn_halves(const RopeParams& rope, const float* cos, float* x) {
  const int64_t half = rope.rotary_dim / 2;
  const float* sin = cos + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Vec a = load(x + i), b = load(x + half + i);
    turn(a, b, load(cos + i), load(sin + i));
    store(x + i, a);
    store(x + half + i, b);
  }
  for (; i < half; ++i) turn(x[i], x[half + i], cos[i], sin[i]);
}

// Every lane of one half of v twice.
template <bool kUpper>
KVLINK_INLINE Vec twice(Vec v) {
  constexpr int k = kUpper ? kLanes / 2 : 0;
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, k, k, k + 1, k + 1, k + 2, k + 2, k + 3, k + 3, k + 4, k + 4,
                                 k + 5, k + 5, k + 6, k + 6, k + 7, k + 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, k, k, k + 1, k + 1, k + 2, k + 2, k + 3, k + 3);
#else
  return __builtin_shufflevector(v, v, k, k, k + 1, k + 1);
#endif
}

KVLINK_INLINE void turn_pairs(float* x, Vec cos, Vec sin) {
  const Vec v = load(x);
  store(x, rounded(v * cos) + rounded(exchange_lanes<1>(v) * sin));
}

void turn_neighbours(const RopeParams& rope, const float* cos, float* x) {
  const int64_t num_pairs = rope.rotary_dim / 2;
  const float* sin = cos + num_pairs;
  const VecI odd = lane_indices() & 1;
  const Vec sign = select(odd == 1, splat(1.0f), splat(-1.0f));
  int64_t i = 0;
  for (; i + kLanes <= num_pairs; i += kLanes) {
    const Vec c = load(cos + i), s = load(sin + i);
    turn_pairs(x + 2 * i, twice<false>(c), twice<false>(s) * sign);
    turn_pairs(x + 2 * i + kLanes, twice<true>(c), twice<true>(s) * sign);
  }
  for (; i < num_pairs; ++i) turn(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
}

template <DType kDType>
void load_row(const char* source, int64_t dims, float* target) {
  int64_t dim = 0;
  for (; dim + kLanes <= dims; dim += kLanes) {
    store(target + dim, Row<kDType>::load(source + dim * Row<kDType>::kBytes));
  }
  if (dim == dims) return;
  const Vec rest = load_some<kDType>(source + dim * Row<kDType>::kBytes, dims - dim);
  __builtin_memcpy(target + dim, &rest, (dims - dim) * sizeof(float));
}

template <DType kDType>
void store_row(const float* source, int64_t dims, char* target) {
  int64_t dim = 0;
  for (; dim + kLanes <= dims; dim += kLanes) {
    Row<kDType>::store(target + dim * Row<kDType>::kBytes, load(source + dim));
  }
  if (dim == dims) return;
  Vec rest = Vec{};
  __builtin_memcpy(&rest, source + dim, (dims - dim) * sizeof(float));
  store_some<kDType>(target + dim * Row<kDType>::kBytes, rest, dims - dim);
}

// By DType.
constexpr decltype(&load_row<DType::kFloat32>) kLoadRow[] = {
    load_row<DType::kFloat32>, load_row<DType::kFloat16>, load_row<DType::kBFloat16>};
constexpr decltype(&store_row<DType::kFloat32>) kStoreRow[] = {
    store_row<DType::kFloat32>, store_row<DType::kFloat16>, store_row<DType::kBFloat16>};

void rotate_row(const ApplyRopeParams& p, int64_t token, int64_t head, float* row) {
  const char* source = static_cast<const char*>(p.x) +
                       (token * p.x_stride_token + head * p.x_stride_head) * dtype_bytes(p.dtype);
  kLoadRow[static_cast<int>(p.dtype)](source, p.head_dim, row);
  const RopeParams& rope = p.rope;
  const float* cos = rope.cos_sin + rope.positions[token] * rope.stride_position;
  (rope.interleaved ? turn_neighbours : turn_halves)(rope, cos, row + rope.first_dim);
}

}  // namespace

void rotate_token(const ApplyRopeParams& params, int64_t token, float* rows) {
  for (int64_t head = 0; head < params.num_heads; ++head) {
    rotate_row(params, token, head, rows + head * params.head_dim);
  }
}

void rotate_token_in_place(const ApplyRopeParams& params, int64_t token, float* row) {
  for (int64_t head = 0; head < params.num_heads; ++head) {
    rotate_row(params, token, head, row);
    const int64_t at = token * params.out_stride_token + head * params.out_stride_head;
    kStoreRow[static_cast<int>(params.dtype)](
        row, params.head_dim, static_cast<char*>(params.out) + at * dtype_bytes(params.dtype));
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
