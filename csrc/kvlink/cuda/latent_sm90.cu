// The kernel of paged_attention for latent pages on sm_90a. It is described in latent_ring.cuh.
#include <numeric>

#include "kvlink/cuda/attention_instances.cuh"
#include "kvlink/cuda/latent_rows.cuh"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/page_map.cuh"

namespace kvlink::cuda {

namespace {

template <DType kDType, bool kGeneral>
__global__ void __launch_bounds__(kThreeGroupThreads, 1)
    attend_latent(const __grid_constant__ LatentArgs args) {
#if defined(KVLINK_HAS_WGMMA)
  using Tile = LatentRows<kDType, kGeneral>;
  if (threadIdx.x == 0) Tile::init_barriers();
  __syncthreads();
  const int group = of_warp(static_cast<int>(threadIdx.x) / kGroupThreads);
  if (group == 0) {
    shrink_registers<40>();
    if (threadIdx.x < 32) {
      prefetch_map(&args.map);
      LatentRing(args, 0).copy_all();
    }
  } else {
    grow_registers<computing_registers(40)>();
    Tile(args, group - 1).attend_all();
  }
#endif
}

auto* kernel_for(const PagedAttentionParams& p) {
  const bool general = p.softcap > 0.0f || p.alibi_slopes || !(p.scale > 0.0f);
  constexpr auto kBF16 = DType::kBFloat16, kFP16 = DType::kFloat16;
  return p.q_dtype == kBF16 ? (general ? attend_latent<kBF16, true> : attend_latent<kBF16, false>)
                            : (general ? attend_latent<kFP16, true> : attend_latent<kFP16, false>);
}

}  // namespace

const Instance& latent_sm90_instance() {
  using Tile = LatentRows<DType::kBFloat16, false>;
  static const Instance kInstance = {.stored = DType::kBFloat16,
                                     .any_q = false,
                                     .max_dim = kLatentDim,
                                     .max_dim_v = kLatentDimV,
                                     .decode = nullptr,
                                     .decode_shared_bytes = 0,
                                     .extend = nullptr,
                                     .extend_shared_bytes = LatentRing::kSharedBytes,
                                     .tile_rows = kGroupRows,
                                     .split_tokens = kLatentSplitTokens,
                                     .threads = kThreeGroupThreads,
                                     .running_bytes = running_bytes<Tile>(),
                                     .resident = 1};
  return kInstance;
}

void latent_attention_sm90(const Args& all, dim3 grid, cudaStream_t stream) {
  const PagedAttentionParams& p = all.p;
  const KVLayout& layout = p.kv.layout;
  const int box = std::gcd(layout.page_size, kLatentTokens);
  const LatentArgs args{
      .map = page_map(layout, layout.k, p.kv.k, layout.head_dim, p.kv.num_pages, box),
      .all = all,
      .box_tokens = box};
  launch("paged_attention: latent, sm_90a", kernel_for(p), grid, kThreeGroupThreads,
         LatentRing::kSharedBytes, stream, args);
}

void load_latent_attention_sm90(const PagedAttentionParams& params) {
  load("paged_attention: latent, sm_90a", kernel_for(params));
}

}  // namespace kvlink::cuda
