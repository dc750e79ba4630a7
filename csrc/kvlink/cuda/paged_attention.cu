// Without q_indptr one kernel does it all. With it there are three steps: a plan of the work, made
// on the device from seq_lens; tiles of it; and the splits of each row put together.
#include <algorithm>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cuda/attention_fold.cuh"
#include "kvlink/cuda/attention_instances.cuh"
#include "kvlink/cuda/attention_plan.cuh"
#include "kvlink/cuda/device_facts.hpp"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/paged_attention_sm90.hpp"
#include "kvlink/cuda/workspace.hpp"

namespace kvlink::cuda {

namespace {

constexpr int64_t kMaxWorkspaceBytes = int64_t{256} << 20;
constexpr int64_t kMaxSlots = int64_t{4} << 20;

bool aligned(const void* data, const Plane& plane, int64_t size) {
  return plane.stride_dim == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         plane.stride_page * size % 16 == 0 && plane.stride_slot * size % 16 == 0 &&
         plane.stride_head * size % 16 == 0;
}

std::span<const Instance> instances_for(DType stored, bool latent) {
  if (stored == DType::kFloat32) return latent ? latent_float_instances() : float_instances();
  if (latent) return latent_instances();
  switch (stored) {
    case DType::kBFloat16:
      return bfloat16_instances();
    case DType::kFloat16:
      return float16_instances();
    case DType::kFloat8E4M3:
      return float8_e4m3_instances();
    case DType::kFloat8E5M2:
      return float8_e5m2_instances();
    case DType::kInt8:
      return int8_instances();
    default:
      return {};
  }
}

const Instance& find_instance(const PagedAttentionParams& p) {
  const KVLayout& layout = p.kv.layout;
  const int64_t size = dtype_bytes(layout.dtype), q_size = dtype_bytes(p.q_dtype);
  const bool latent = layout.form == KVForm::kLatent;
  const auto missing = [](const auto&... parts) {
    return Unsupported(concat("paged_attention on CUDA: ", parts...));
  };
  if (layout.form == KVForm::kOpaque)
    throw missing("pool: attention needs K and V, not opaque pages");
  if (size > 1 && layout.has_scales()) throw missing("pool: scales of ", dtype_name(layout.dtype));
  if (layout.head_dim % 16 != 0 || layout.head_dim_v % 16 != 0) {
    throw missing("head_dim: supported are multiples of 16; got ", layout.head_dim, " and ",
                  layout.head_dim_v);
  }
  if (!aligned(p.kv.k, layout.k, size) || (!latent && !aligned(p.kv.v, layout.v, size))) {
    throw missing("pool: supported are contiguous rows that begin at multiples of 16 bytes");
  }
  if (reinterpret_cast<uintptr_t>(p.q) % 16 != 0 || p.q_stride_token * q_size % 16 != 0 ||
      p.q_stride_head * q_size % 16 != 0) {
    throw missing("q: supported are rows that begin at multiples of 16 bytes");
  }
  if (reinterpret_cast<uintptr_t>(p.out) % 4 != 0 || p.out_stride_token % 2 != 0 ||
      p.out_stride_head % 2 != 0) {
    throw missing("out: supported are rows that begin at multiples of 4 bytes");
  }
  int largest = 0, largest_v = 0;
  for (const Instance& each : instances_for(layout.dtype, latent)) {
    if (each.stored != layout.dtype) continue;
    largest = std::max(largest, each.max_dim), largest_v = std::max(largest_v, each.max_dim_v);
    const DType wanted = size == 1 ? DType::kBFloat16 : each.stored;
    if ((each.any_q || p.q_dtype == wanted) && layout.head_dim <= each.max_dim &&
        layout.head_dim_v <= each.max_dim_v) {
      return each;
    }
  }
  if (largest == 0) throw missing("pool: no kernel for ", dtype_name(layout.dtype));
  throw missing("head_dim and head_dim_v: supported up to ", largest, " and ", largest_v, "; got ",
                layout.head_dim, " and ", layout.head_dim_v);
}

void check_shapes(const PagedAttentionParams& p) {
  const int num_kv_heads = p.kv.layout.num_kv_heads;
  KVLINK_CHECK(p.num_q_heads > 0 && p.num_q_heads % num_kv_heads == 0,
               "q: expected a number of query heads that is a multiple of the ", num_kv_heads,
               " KV heads; got ", p.num_q_heads);
  KVLINK_CHECK(p.q_indptr || p.num_tokens == p.num_seqs, "q: expected one row for each of the ",
               p.num_seqs, " sequences, or q_indptr; got ", p.num_tokens);
  constexpr int64_t kMax = INT32_MAX / 2;
  KVLINK_CHECK(p.num_entries * p.kv.layout.page_size <= kMax, "page_table: expected at most ", kMax,
               " positions; got ", p.num_entries, " entries of ", p.kv.layout.page_size);
}

// Of at most `wanted` blocks for each of `columns`, `each` for a processor; some may wait for their
// turn.
unsigned num_rows_of_blocks(int64_t wanted, int64_t columns, int64_t each) {
  return static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(num_processors() * each, columns), 1, wanted));
}

// One thread, before decode of a call with readiness: its answer is that of all blocks.
__global__ void await_ready(const __grid_constant__ Args args) {
  *args.verdict = wait_ready(args.ready, args.errors);
}

// Sequences [first_seq, first_seq + num_seqs), with at most `max_items` splits.
void run_decode(const Instance& with, Args args, int64_t max_items, cudaStream_t stream) {
  const PagedAttentionParams& p = args.p;
  const KVLayout& layout = p.kv.layout;
  const int64_t tiles = ceil_div(int64_t{p.num_q_heads / layout.num_kv_heads}, 16);
  const auto columns = static_cast<unsigned>(layout.num_kv_heads * tiles);
  const int64_t outs_bytes = max_items * p.num_q_heads * layout.head_dim_v * 4;
  const int64_t states_bytes = max_items * p.num_q_heads * static_cast<int64_t>(sizeof(State));
  Workspace workspace(args.num_seqs * int64_t{columns}, outs_bytes + states_bytes + sizeof(int),
                      stream);
  args.counters = workspace.counters();
  args.max_items = static_cast<int>(max_items);
  args.outs = reinterpret_cast<float*>(workspace.data());
  args.states = reinterpret_cast<State*>(workspace.data() + outs_bytes);
  if (args.ready.num_items > 0) {
    args.verdict = reinterpret_cast<int*>(workspace.data() + outs_bytes + states_bytes);
    load("paged_attention: decode", with.decode);
    launch("paged_attention: ready", await_ready, dim3(1), 1, 0, stream, args);
  }
  launch("paged_attention: decode", with.decode,
         dim3(columns, num_rows_of_blocks(max_items, columns, 8)), kDecodeThreads,
         with.decode_shared_bytes, stream, args);
  workspace.queued();
}

void run_extend(const Instance& with, Args args, int64_t max_splits, cudaStream_t stream) {
  const PagedAttentionParams& p = args.p;
  const KVLayout& layout = p.kv.layout;
  const int64_t heads = layout.num_kv_heads, rows = p.num_tokens * (p.num_q_heads / heads);
  // What may go split by split, within the workspace.
  const int64_t divided = std::min(rows, p.num_seqs * kMaxSplitTiles * with.tile_rows);
  const int64_t out_bytes = heads * layout.head_dim_v * 4;
  const int64_t state_bytes = heads * static_cast<int64_t>(sizeof(State));
  const int64_t slots = max_splits <= 1
                            ? 0
                            : std::min({divided * max_splits, kMaxSlots,
                                        kMaxWorkspaceBytes / (out_bytes + state_bytes)});
  const int64_t max_tiles = rows / with.tile_rows + p.num_seqs;
  const int64_t max_items = slots > 0 ? max_tiles * max_splits : max_tiles;
  const unsigned rows_of_blocks = num_rows_of_blocks(max_items, heads, with.resident);
  if (!with.extend) args.share_blocks = static_cast<int>(heads * rows_of_blocks);
  const int64_t running_bytes = max_splits > 1 ? heads * rows_of_blocks * with.running_bytes : 0;
  const int64_t plans_bytes = round_up((args.num_seqs + 1) * int64_t{sizeof(SequencePlan)}, 16);
  const PrefillChoice prefill =
      layout.form == KVForm::kLatent ? PrefillChoice{} : choose_prefill(p);
  args.most_rows = prefill.lacks ? INT32_MAX : prefill.most_rows;
  const int64_t max_prefill = rows > args.most_rows ? rows / kPrefillRows + args.num_seqs : 0;
  const int64_t prefill_bytes = round_up((max_prefill + 1) * int64_t{sizeof(PrefillTile)}, 16);
  Workspace workspace(
      0, running_bytes + plans_bytes + prefill_bytes + slots * (out_bytes + state_bytes), stream);
  char* at = workspace.data();
  args.running = reinterpret_cast<float4*>(at);
  args.plans = reinterpret_cast<SequencePlan*>(at += running_bytes);
  if (max_prefill > 0) args.prefill = reinterpret_cast<PrefillTile*>(at + plans_bytes);
  args.states = reinterpret_cast<State*>(at += plans_bytes + prefill_bytes);
  args.outs = reinterpret_cast<float*>(at + slots * state_bytes);
  args.max_slots = static_cast<int>(slots);
  if (args.ready.num_items > 0) {  // what is launched behind the plan, which waits
    if (args.prefill) load_paged_attention_sm90(p, prefill.parts);
    with.extend ? load("paged_attention: extend", with.extend) : load_latent_attention_sm90(p);
    load("paged_attention: fold", fold_splits);
  }
  launch("paged_attention: plan", make_plans, dim3(1), kPlanThreads,
         (2 * kPlanThreads + 1) * sizeof(int), stream, args);
  if (args.prefill) {
    paged_attention_sm90(p, args.plans, args.prefill, max_prefill, args.errors, prefill.parts,
                         stream);
  }
  const dim3 grid(static_cast<unsigned>(heads), rows_of_blocks);
  if (with.extend) {
    launch("paged_attention: extend", with.extend, grid, with.threads, with.extend_shared_bytes,
           stream, args);
  } else {
    latent_attention_sm90(args, grid, stream);
  }
  if (slots > 0) {
    const int64_t folded = std::min(divided, slots / 2) * heads;
    const int64_t blocks = std::max<int64_t>(1, ceil_div(folded, kFoldThreads / 32));
    launch("paged_attention: fold", fold_splits, dim3(num_rows_of_blocks(blocks, 1, 16)),
           kFoldThreads, 0, stream, args);
  }
  workspace.queued();
}

}  // namespace

void paged_attention(const PagedAttentionParams& params, const ReadyCounters& ready,
                     cudaStream_t stream) {
  check_shapes(params);
  const Instance& found = find_instance(params);
  const Instance& with = takes_latent(params) ? latent_sm90_instance() : found;
  report_errors();
  if (params.num_tokens == 0 || params.num_seqs == 0) return;
  const KVLayout& layout = params.kv.layout;
  const bool decodes = params.q_indptr == nullptr && with.decode != nullptr;
  Args args{.p = params,
            .ready = ready,
            .states = nullptr,
            .outs = nullptr,
            .errors = error_record(),
            .num_seqs = static_cast<int>(params.num_seqs),
            .split_tokens = decodes ? kDecodeSplitTokens : with.split_tokens,
            .first_seq = 0,
            .max_items = 0,
            .verdict = nullptr,
            .counters = nullptr,
            .plans = nullptr,
            .running = nullptr,
            .tile_rows = with.tile_rows,
            .max_slots = 0,
            .share_blocks = 0,
            .prefill = nullptr,
            .most_rows = INT32_MAX};
  const int64_t splits = ceil_div(params.num_entries * layout.page_size, args.split_tokens);
  if (!decodes) return run_extend(with, args, splits, stream);
  if (params.page_indptr) return run_decode(with, args, splits + params.num_seqs, stream);
  // Wide page tables, of which little may be used: no more sequences at a time than fit.
  const int64_t items = std::max<int64_t>(splits, 1);
  const int64_t seq_bytes = items * params.num_q_heads * (layout.head_dim_v + 2) * 4;
  const auto at_once =
      static_cast<int>(std::clamp<int64_t>(kMaxWorkspaceBytes / seq_bytes, 1, params.num_seqs));
  for (; args.first_seq < params.num_seqs; args.first_seq += at_once) {
    args.num_seqs = std::min(at_once, static_cast<int>(params.num_seqs) - args.first_seq);
    run_decode(with, args, args.num_seqs * items, stream);
    args.ready.timeout_ns = 0;  // whoever comes later need not wait again
  }
}

}  // namespace kvlink::cuda
