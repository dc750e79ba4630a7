// Every type that paged_attention supports at the level being compiled, and the vector code for it.
// Included by paged_attention_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/pack_rows.hpp"
#include "kvlink/cpu/simd/page_rows.hpp"
#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"
#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// --- rows of q and out ---------------------------------------------------------------------------

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
void store_row(const float* source, float factor, int64_t dims, char* target) {
  int64_t dim = 0;
  for (; dim + kLanes <= dims; dim += kLanes) {
    Row<kDType>::store(target + dim * Row<kDType>::kBytes, load(source + dim) * factor);
  }
  // NOTE: rows of `source` are padded to whole vectors.
  if (dim < dims) {
    store_some<kDType>(target + dim * Row<kDType>::kBytes, load(source + dim) * factor, dims - dim);
  }
}

// A row whose elements stay as they are: pairs of bfloat16.
inline void copy_row(const char* source, int64_t dims, float* target) {
  __builtin_memcpy(target, source, dims * 2);
}

struct QueryType {
  void (*load_row)(const char*, int64_t, float*);
  void (*store_row)(const float*, float, int64_t, char*);
};
constexpr QueryType kQueryTypes[] = {
    {load_row<DType::kFloat32>, store_row<DType::kFloat32>},
    {load_row<DType::kFloat16>, store_row<DType::kFloat16>},
    {load_row<DType::kBFloat16>, store_row<DType::kBFloat16>},
};

// --- the supported instances -----------------------------------------------------------------

// How values of a stored type are added, in place or from a panel.
struct ValueType {
  void (*add)(const ValueRows&);
  void (*pack)(const PanelRows&, const PanelRows&, int64_t, int64_t, float*);
};
template <DType kDType>
constexpr ValueType kValuesOf = {add_values<kDType>, pack_values<kDType>};
// By DType: anything but raw bytes may be stored.
constexpr ValueType kValueTypes[] = {
    kValuesOf<DType::kFloat32>,    kValuesOf<DType::kFloat16>,    kValuesOf<DType::kBFloat16>,
    kValuesOf<DType::kFloat8E4M3>, kValuesOf<DType::kFloat8E5M2>, kValuesOf<DType::kInt8>,
};

// How scores are computed, in place or from a panel, and what an item of q is: a float, or two
// bfloat16 side by side.
struct ScoreType {
  int item_dims;
  void (*score)(const ScoreRows&);
  void (*pack)(const PanelRows&, const PanelRows&, int64_t, float*);
  void (*product)(const float*, const TileProduct<FloatTerms>&);
};
void float_product(const float* q, const TileProduct<FloatTerms>& shape) {
  TileProduct<FloatTerms> t = shape;
  t.a = q;
  tile_product<2>(t);
}
#if defined(__AVX512F__)
void pair_product(const float* q, const TileProduct<FloatTerms>& t) {
  tile_product<2, PairTerms>({.a = reinterpret_cast<const uint32_t*>(q),
                              .b = t.b,
                              .c = t.c,
                              .row_scale = t.row_scale,
                              .stride_a = t.stride_a,
                              .stride_b = t.stride_b,
                              .stride_c = t.stride_c,
                              .num_rows = t.num_rows,
                              .depth = t.depth,
                              .num_vecs = t.num_vecs});
}
#endif
template <DType kDType>
constexpr ScoreType kScoresOf = {1, score_rows<FloatUnits<kDType>>, pack_keys<FloatItems<kDType>>,
                                 float_product};
constexpr ScoreType kScoreTypes[] = {
    kScoresOf<DType::kFloat32>,    kScoresOf<DType::kFloat16>,    kScoresOf<DType::kBFloat16>,
    kScoresOf<DType::kFloat8E4M3>, kScoresOf<DType::kFloat8E5M2>, kScoresOf<DType::kInt8>,
};

#if defined(__AVX512F__)
// q and K both bfloat16, on CPUs that have AVX512_BF16: the products of two neighbours are added to
// the float32 sum by one instruction.
constexpr ScoreType kPairScores = {2, score_rows<PairUnits>, pack_keys<PairItems>, pair_product};
const bool has_pair_products = __builtin_cpu_supports("avx512bf16");
#endif

const ScoreType& score_type(const PagedAttentionParams& p) {
#if defined(__AVX512F__)
  const bool pairs = p.q_dtype == DType::kBFloat16 && p.kv.layout.dtype == DType::kBFloat16;
  if (pairs && p.kv.layout.head_dim % 2 == 0 && has_pair_products) return kPairScores;
#endif
  return kScoreTypes[static_cast<int>(p.kv.layout.dtype)];
}

}  // namespace

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
