// The sm_90a kernel of long prompts, described in prefill_ring.cuh, and when it is taken; and when
// that of latent pages is (latent_sm90.cu).
#include <algorithm>
#include <atomic>
#include <iterator>
#include <numeric>

#include "kvlink/base/check.hpp"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/page_map.cuh"
#include "kvlink/cuda/paged_attention_sm90.hpp"
#include "kvlink/cuda/prefill_rows.cuh"

namespace kvlink::cuda {

namespace {

template <DType kDType, int kDim, int kDimV, bool kGeneral, int kParts>
__global__ void __launch_bounds__(kThreeGroupThreads, 1)
    prefill(const __grid_constant__ PrefillArgs args) {
#if defined(KVLINK_HAS_WGMMA)
  using Tile = PrefillRows<kDType, kDim, kDimV, kGeneral, kParts>;
  if (threadIdx.x == 0) Tile::init_barriers();
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (group == 0) {
    shrink_registers<24>();
    if (threadIdx.x < 32) {
      prefetch_map(&args.k_map);
      prefetch_map(&args.v_map);
      Tile(args, 0).copy_all();
    }
  } else {
    grow_registers<computing_registers(24)>();
    Tile(args, group - 1).attend_all();
  }
#endif
}

// --- the host
// -------------------------------------------------------------------------------------

struct Instance {
  DType dtype;
  int dim, dim_v;
  bool general;
  int parts;
  void (*kernel)(PrefillArgs);
  size_t shared_bytes;
};

template <DType kDType, int kDim, int kDimV, bool kGeneral, int kParts>
constexpr Instance instance() {
  return {kDType,
          kDim,
          kDimV,
          kGeneral,
          kParts,
          prefill<kDType, kDim, kDimV, kGeneral, kParts>,
          PrefillRing<kDim, kDimV>::kSharedBytes};
}

constexpr auto kBF16 = DType::kBFloat16;
constexpr auto kFP16 = DType::kFloat16;
// The first that fits is taken.
const Instance kInstances[] = {
    instance<kBF16, 64, 64, false, 1>(),   instance<kBF16, 64, 64, true, 1>(),
    instance<kBF16, 64, 64, true, 2>(),    instance<kBF16, 128, 128, false, 1>(),
    instance<kBF16, 128, 128, true, 1>(),  instance<kBF16, 128, 128, true, 2>(),
    instance<kBF16, 256, 256, false, 1>(), instance<kBF16, 256, 256, true, 1>(),
    instance<kBF16, 256, 256, true, 2>(),  instance<kFP16, 64, 64, false, 1>(),
    instance<kFP16, 64, 64, true, 1>(),    instance<kFP16, 64, 64, true, 2>(),
    instance<kFP16, 128, 128, false, 1>(), instance<kFP16, 128, 128, true, 1>(),
    instance<kFP16, 128, 128, true, 2>(),  instance<kFP16, 256, 256, false, 1>(),
    instance<kFP16, 256, 256, true, 1>(),  instance<kFP16, 256, 256, true, 2>(),
};

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// What the kernels lack for a call; null: nothing.
const char* find_lack(const PagedAttentionParams& p) {
  const KVLayout& layout = p.kv.layout;
#if !defined(KVLINK_SM_90A)
  return "this build has no code for sm_90a";
#endif
  if (attribute(cudaDevAttrComputeCapabilityMajor) != 9) return "the device is not of sm_90";
  if (p.q_dtype != layout.dtype || layout.has_scales()) return "q and KV differ in dtype";
  if (p.q_dtype != kBF16 && p.q_dtype != kFP16) return "q is neither bfloat16 nor float16";
  if (layout.page_size % 8 != 0) return "page_size is no multiple of 8";
  const bool latent = layout.form == KVForm::kLatent;
  if (!latent && std::max(layout.head_dim, layout.head_dim_v) > 256) return "head_dim exceeds 256";
  if (layout.head_dim % 8 != 0 || layout.head_dim_v % 8 != 0) return "head_dim: multiples of 8";
  if (p.kv.num_pages <= 0) return "the pool has no pages";
  if (!copied_by_boxes(layout.k, p.kv.k) || (!latent && !copied_by_boxes(layout.v, p.kv.v))) {
    return "rows of the pool do not begin at multiples of 16 bytes";
  }
  if (reinterpret_cast<uintptr_t>(p.q) % 16 != 0 || p.q_stride_token % 8 != 0 ||
      p.q_stride_head % 8 != 0 || reinterpret_cast<uintptr_t>(p.out) % 16 != 0 ||
      p.out_stride_token % 8 != 0 || p.out_stride_head % 8 != 0) {
    return "rows of q or out do not begin at multiples of 16 bytes";
  }
  if (p.mask || p.q_positions || p.generations || p.ready.num_items > 0) {
    return "mask, q_positions, generations or ready are asked for";
  }
  return nullptr;
}

constexpr int kMostRows = 64;         // one tile of the kernel of extend
constexpr int kMostLatentHeads = 32;  // one tile of a token there

struct Setting {
  const char* name;
  bool never;
  int most_rows;
  WeightParts parts;
};

constexpr Setting kSettings[] = {{"auto", false, kMostRows, WeightParts::kOne},
                                 {"mma.sync", true, 0, WeightParts::kOne},
                                 {"wgmma", false, 0, WeightParts::kOne},
                                 {"wgmma, two parts", false, 0, WeightParts::kTwo}};

const Instance& instance_for(const PagedAttentionParams& p, WeightParts parts) {
  const KVLayout& layout = p.kv.layout;
  const int num_parts = static_cast<int>(parts);
  const bool general = num_parts == 2 || p.softcap > 0.0f || p.alibi_slopes || !(p.scale > 0.0f);
  return *std::find_if(std::begin(kInstances), std::end(kInstances), [&](const Instance& each) {
    return each.dtype == p.q_dtype && layout.head_dim <= each.dim &&
           layout.head_dim_v <= each.dim_v && each.general == general && each.parts == num_parts;
  });
}

std::atomic<const Setting*> setting = &kSettings[0];
thread_local const char* last_lack = "there was no call";

}  // namespace

PrefillChoice choose_prefill(const PagedAttentionParams& params) {
  const Setting& set = *setting.load();
  last_lack = set.never ? "it was asked for" : find_lack(params);
  return {.lacks = last_lack, .most_rows = set.most_rows, .parts = set.parts};
}

bool takes_latent(const PagedAttentionParams& params) {
  if (params.kv.layout.form != KVForm::kLatent) return false;
  const Setting& set = *setting.load();
  const bool few = set.most_rows > 0 && params.num_q_heads <= kMostLatentHeads;
  last_lack = set.never                        ? "it was asked for"
              : set.parts == WeightParts::kTwo ? "weights of latent pages are in one part"
              : few                            ? "few query heads"
                                               : find_lack(params);
  return last_lack == nullptr;
}

void set_prefill(const std::string& name) {
  for (const Setting& each : kSettings) {
    if (name == each.name) return setting.store(&each);
  }
  throw InvalidArgument(
      concat("name: expected auto, mma.sync, wgmma or \"wgmma, two parts\"; got ", name));
}

std::string last_prefill() {
  return last_lack ? std::string("mma.sync: ") + last_lack : std::string("wgmma");
}

void paged_attention_sm90(const PagedAttentionParams& params, const SequencePlan* plans,
                          const PrefillTile* tiles, int64_t max_tiles, ErrorRecord* errors,
                          WeightParts parts, cudaStream_t stream) {
  const KVLayout& layout = params.kv.layout;
  const Instance& with = instance_for(params, parts);
  const int block_tokens = with.dim_v > 128 ? 64 : 128;
  const int box = std::gcd(layout.page_size, block_tokens);
  const PrefillArgs args{
      .k_map = page_map(layout, layout.k, params.kv.k, layout.head_dim, params.kv.num_pages, box),
      .v_map = page_map(layout, layout.v, params.kv.v, layout.head_dim_v, params.kv.num_pages, box),
      .p = params,
      .plans = plans,
      .tiles = tiles,
      .errors = errors,
      .box_tokens = box};
  const int64_t blocks =
      std::min<int64_t>(attribute(cudaDevAttrMultiProcessorCount), max_tiles * layout.num_kv_heads);
  launch("paged_attention: prefill, sm_90a", with.kernel, dim3(static_cast<unsigned>(blocks)),
         kThreeGroupThreads, with.shared_bytes, stream, args);
}

void load_paged_attention_sm90(const PagedAttentionParams& params, WeightParts parts) {
  load("paged_attention: prefill, sm_90a", instance_for(params, parts).kernel);
}

}  // namespace kvlink::cuda
