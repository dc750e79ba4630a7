// The kernels that there are: attention_*.cu list them.
#pragma once

#include <span>

#include "kvlink/cuda/attention_decode.cuh"
#include "kvlink/cuda/attention_kernels.cuh"
#include "kvlink/cuda/latent_tile.cuh"

namespace kvlink::cuda {

using Kernel = void (*)(Args);

// The kernels for one stored dtype. `any_q`: for queries of every float dtype, else of the stored
// one (of one-byte dtypes: bfloat16).
struct Instance {
  DType stored;
  bool any_q;
  int max_dim, max_dim_v;
  Kernel decode;  // null: extend serves decode, too
  size_t decode_shared_bytes;
  Kernel extend;
  size_t extend_shared_bytes;
  int tile_rows, split_tokens, threads;
  int running_bytes;  // of a block
  int resident = 4;   // blocks of a processor at once
};

template <typename Tile>
constexpr int running_bytes() {
  return Running<Tile>::kVectors * Tile::kThreads * static_cast<int>(sizeof(float4));
}

template <DType kKV, int kMaxDim, int kParts>
constexpr Instance instance() {
  using Decode = AttentionTile<kKV, kMaxDim, 1, kParts>;
  using Extend = AttentionTile<kKV, kMaxDim, 4, kParts>;
  return {.stored = kKV,
          .any_q = kParts == 2,
          .max_dim = kMaxDim,
          .max_dim_v = kMaxDim,
          .decode = decode<Decode>,
          .decode_shared_bytes = kDecodeSharedBytes<Decode>,
          .extend = extend<Extend>,
          .extend_shared_bytes = Extend::kSharedBytes,
          .tile_rows = Extend::kRows,
          .split_tokens = Extend::kSplitTokens,
          .threads = Extend::kThreads,
          .running_bytes = running_bytes<Extend>()};
}

// Of a tile that serves decode, too.
template <typename Tile>
constexpr Instance extend_instance(DType stored, bool any_q, int max_dim, int max_dim_v) {
  return {.stored = stored,
          .any_q = any_q,
          .max_dim = max_dim,
          .max_dim_v = max_dim_v,
          .decode = nullptr,
          .decode_shared_bytes = 0,
          .extend = extend<Tile>,
          .extend_shared_bytes = Tile::kSharedBytes,
          .tile_rows = Tile::kRows,
          .split_tokens = Tile::kSplitTokens,
          .threads = Tile::kThreads,
          .running_bytes = running_bytes<Tile>()};
}

template <DType kKV, int kParts>
constexpr Instance latent_instance() {
  return extend_instance<LatentTile<kKV, kParts>>(kKV, kParts == 2, kLatentDim, kLatentDimV);
}

// Of one stored dtype, or of all of a kind; the first that fits a call is taken.
std::span<const Instance> bfloat16_instances();
std::span<const Instance> float16_instances();
std::span<const Instance> float8_e4m3_instances();
std::span<const Instance> float8_e5m2_instances();
std::span<const Instance> int8_instances();
std::span<const Instance> latent_instances();
std::span<const Instance> float_instances();
std::span<const Instance> latent_float_instances();
// The one whose extend is latent_attention_sm90.
const Instance& latent_sm90_instance();
void latent_attention_sm90(const Args& args, dim3 grid, cudaStream_t stream);
void load_latent_attention_sm90(const PagedAttentionParams& params);

}  // namespace kvlink::cuda
