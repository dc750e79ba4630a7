// Every type that paged_attention supports at the level being compiled, and the vector code for it.
// Included by paged_attention_simd.cpp only.
#pragma once

#include "kvlink/cpu/simd/pack_rows.hpp"
#include "kvlink/cpu/simd/page_rows.hpp"
#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/soften_rows.hpp"
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

// How values of a stored type are added, in place or from a panel: one position at a time, or two.
struct ValueType {
  int positions;
  void (*add)(const ValueRows&);
  void (*pack)(const PanelRows&, int64_t, int64_t, float*);
  void (*product)(const TileProduct&);
};
template <DType kDType>
constexpr ValueType kFloatValues = {1, add_values<FloatValues<kDType>>, pack_values<kDType>,
                                    tile_product<1, FloatTerms>};
// By DType: anything but raw bytes may be stored.
constexpr ValueType kValueTypes[] = {
    kFloatValues<DType::kFloat32>,    kFloatValues<DType::kFloat16>,
    kFloatValues<DType::kBFloat16>,   kFloatValues<DType::kFloat8E4M3>,
    kFloatValues<DType::kFloat8E5M2>, kFloatValues<DType::kInt8>,
};

// How scores are computed, in place or from a panel, and what an item of q is: a float, or two
// bfloat16 side by side.
struct ScoreType {
  int item_dims;
  int items_of;  // a power of 2; a panel has a multiple of this many items
  void (*store_query_parts)(const char*, int64_t, int64_t, int64_t, int64_t, float*);  // or null
  void (*score)(const ScoreRows&);
  void (*pack)(const PanelRows&, int64_t, float*);
  void (*product)(const TileProduct&);
};
template <DType kDType>
constexpr ScoreType kFloatScores = {.item_dims = 1,
                                    .items_of = 1,
                                    .store_query_parts = nullptr,
                                    .score = score_keys<FloatKeys<kDType>>,
                                    .pack = pack_keys<FloatItems<kDType>>,
                                    .product = tile_product<kLanes, FloatTerms>};
constexpr ScoreType kScoreTypes[] = {
    kFloatScores<DType::kFloat32>,    kFloatScores<DType::kFloat16>,
    kFloatScores<DType::kBFloat16>,   kFloatScores<DType::kFloat8E4M3>,
    kFloatScores<DType::kFloat8E5M2>, kFloatScores<DType::kInt8>,
};

// Queries are of bfloat16, and so may K and V be without rounding. Then weights are rounded to
// bfloat16 before they meet V, on every CPU.
constexpr int kFirstPairType = static_cast<int>(DType::kBFloat16);
bool is_bfloat16(const PagedAttentionParams& p) {
  return p.q_dtype == DType::kBFloat16 && static_cast<int>(p.kv.layout.dtype) >= kFirstPairType;
}

#if defined(__AVX512F__)
// On CPUs that can, the products of two neighbours are added to the float32 sum by one instruction.
template <DType kDType>
constexpr ValueType kPairValues = {2, add_values<PairValues<kDType>>, pack_value_pairs<kDType>,
                                   tile_product<1, PairTerms>};
template <DType kDType>
constexpr ScoreType kPairScores = {.item_dims = 2,
                                   .items_of = kLanes,
                                   .store_query_parts = nullptr,
                                   .score = score_keys<PairKeys<kDType>>,
                                   .pack = pack_keys<PairItems<kDType>>,
                                   .product = tile_product<kLanes, PairTerms>};
constexpr ScoreType kPartScores = {.item_dims = 2,
                                   .items_of = kPartChains,
                                   .store_query_parts = store_query_parts,
                                   .score = score_parts,
                                   .pack = pack_keys<PairItems<DType::kBFloat16>>,
                                   .product = tile_product<kPartChains, PairTerms>};
constexpr ValueType kPairValueTypes[] = {
    kPairValues<DType::kBFloat16>,
    kPairValues<DType::kFloat8E4M3>,
    kPairValues<DType::kFloat8E5M2>,
    kPairValues<DType::kInt8>,
};
constexpr ScoreType kPairScoreTypes[] = {
    kPartScores,
    kPairScores<DType::kFloat8E4M3>,
    kPairScores<DType::kFloat8E5M2>,
    kPairScores<DType::kInt8>,
};

bool takes_pairs(const PagedAttentionParams& p) { return is_bfloat16(p) && has_pair_products(); }
#endif

const ScoreType& score_type(const PagedAttentionParams& p) {
  const int dtype = static_cast<int>(p.kv.layout.dtype);
#if defined(__AVX512F__)
  if (takes_pairs(p) && p.kv.layout.head_dim % 2 == 0) {
    return kPairScoreTypes[dtype - kFirstPairType];
  }
#endif
  return kScoreTypes[dtype];
}

const ValueType& value_type(const PagedAttentionParams& p) {
  const int dtype = static_cast<int>(p.kv.layout.dtype);
#if defined(__AVX512F__)
  if (takes_pairs(p)) return kPairValueTypes[dtype - kFirstPairType];
#endif
  return kValueTypes[dtype];
}

Weights weights_of(const PagedAttentionParams& p) {
  if (!is_bfloat16(p)) return Weights::kFloats;
  return value_type(p).positions == 2 ? Weights::kPairs : Weights::kRounded;
}

}  // namespace

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
