// Three steps: a plan of the work, made on the device from seq_lens; tiles of it; and for decode,
// the splits of each row put together.
#include <algorithm>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cuda/attention_tile.cuh"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/paged_attention.hpp"
#include "kvlink/cuda/scratch.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kPlanThreads = 256;
constexpr int kSplitTokens = 512;  // counted from position 0, so they depend on nothing else
constexpr int kDecodeRows = 16;
constexpr int kExtendRows = 64;
constexpr int kResident = 2;  // blocks on a processor that registers must suffice for
constexpr int64_t kMaxWorkspaceBytes = int64_t{256} << 20;

// Softmax of one row over one split: sum is of 2^(score - max), out is weighted the same way.
struct State {
  float max, sum;
};

struct Args {
  PagedAttentionParams p;
  SequencePlan* plans;  // [num_seqs + 1]; the last has only first_item, their total
  State* states;        // decode: [items, num_q_heads]
  float* outs;          // decode: [items, num_q_heads, head_dim_v]
  ErrorRecord* errors;
  int first_seq, num_seqs;
  bool decode;
};

// --- the plan
// -------------------------------------------------------------------------------------

__device__ bool rises(const Args& args, const int32_t* indptr, int seq, int64_t total) {
  const bool good = indptr[seq] >= 0 && indptr[seq] <= indptr[seq + 1] && indptr[seq + 1] <= total;
  if (!good) record_error(args.errors, BadEntry::kIndptr, seq + 1, indptr[seq + 1]);
  return good;
}

// What can be trusted of a sequence; `items` is its share of the work.
__device__ SequencePlan plan_sequence(const Args& args, int seq, int* items) {
  const PagedAttentionParams& p = args.p;
  const int page_size = p.kv.layout.page_size;
  SequencePlan plan{};
  int64_t num_entries = p.num_entries;
  plan.first_entry = seq * p.page_table_stride;
  bool good = true;
  if (p.page_indptr) {
    good = rises(args, p.page_indptr, seq, p.num_entries);
    plan.first_entry = good ? p.page_indptr[seq] : 0;
    num_entries = good ? p.page_indptr[seq + 1] - plan.first_entry : 0;
  }
  plan.first_row = seq;
  plan.num_rows = 1;
  if (p.q_indptr) {
    const bool rows_good = rises(args, p.q_indptr, seq, p.num_tokens);
    plan.first_row = rows_good ? p.q_indptr[seq] : 0;
    plan.num_rows = rows_good ? p.q_indptr[seq + 1] - plan.first_row : 0;
  }
  const int64_t seq_len = p.seq_lens[seq];
  if (seq_len < 0 || seq_len > num_entries * page_size ||
      (seq_len > 0 && seq_len < plan.num_rows)) {
    if (good) record_error(args.errors, BadEntry::kSeqLens, seq, seq_len);
    good = false;
  }
  plan.seq_len = good ? static_cast<int>(seq_len) : 0;
  if (args.decode) {
    const Range range = visible(p, plan.seq_len - 1, plan.seq_len);
    plan.first_split = range.begin / kSplitTokens;
    *items = range.end > range.begin
                 ? (range.end + kSplitTokens - 1) / kSplitTokens - plan.first_split
                 : 0;
  } else {
    const int rows = plan.num_rows * (p.num_q_heads / p.kv.layout.num_kv_heads);
    *items = (rows + kExtendRows - 1) / kExtendRows;
  }
  return plan;
}

// One block: a running sum of the sequences' items.
__global__ void __launch_bounds__(kPlanThreads) make_plans(const __grid_constant__ Args args) {
  auto* sums = reinterpret_cast<int*>(shared_memory());  // [2][kPlanThreads]
  const int thread = static_cast<int>(threadIdx.x);
  int before = 0;
  for (int first = 0; first < args.num_seqs; first += kPlanThreads) {
    const int seq = first + thread;
    int items = 0;
    SequencePlan plan{};
    if (seq < args.num_seqs) plan = plan_sequence(args, args.first_seq + seq, &items);
    int side = 0;
    sums[thread] = items;
    __syncthreads();
    for (int distance = 1; distance < kPlanThreads; distance *= 2) {
      const int* from = sums + side * kPlanThreads;
      const int sum = from[thread] + (thread >= distance ? from[thread - distance] : 0);
      side = 1 - side;
      sums[side * kPlanThreads + thread] = sum;
      __syncthreads();
    }
    if (seq < args.num_seqs) {
      plan.first_item = before + sums[side * kPlanThreads + thread] - items;
      args.plans[seq] = plan;
    }
    before += sums[side * kPlanThreads + kPlanThreads - 1];
    __syncthreads();
  }
  if (thread == 0) args.plans[args.num_seqs].first_item = before;
}

// The sequence that an item belongs to.
__device__ int find_sequence(const Args& args, int item) {
  int low = 0, high = args.num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (args.plans[middle].first_item <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// --- results
// --------------------------------------------------------------------------------------

template <DType kDType>
__device__ void store_pair(const PagedAttentionParams& p, int64_t token, int head, int dim, float a,
                           float b) {
  auto* to = static_cast<uint16_t*>(p.out) + token * p.out_stride_token + head * p.out_stride_head;
  *reinterpret_cast<uint32_t*>(to + dim) = pack_halves<kDType>(a, b);
}

struct Denominator {
  float factor;  // of the row's out
  float lse;     // natural
};

__device__ Denominator denominator(const PagedAttentionParams& p, int head, State state) {
  if (state.max == -INFINITY) return {0.0f, -INFINITY};
  const float sink = p.sinks ? p.sinks[head] * kLog2E : -INFINITY;
  const float max = fmaxf(state.max, sink);
  const float shrink = exp2_fast(state.max - max);
  const float sum = state.sum * shrink + exp2_fast(sink - max);
  return {shrink / sum, max * kLn2 + logf(sum)};
}

// --- tiles
// ----------------------------------------------------------------------------------------

// Grid: items (tiles of rows) in x, KV heads in y.
template <DType kDType, int kMaxDim>
__global__ void __launch_bounds__(kTileThreads, kResident)
    extend(const __grid_constant__ Args args) {
  using Tile = AttentionTile<kDType, kMaxDim, kExtendRows / 16>;
  const PagedAttentionParams& p = args.p;
  const int item = static_cast<int>(blockIdx.x);
  if (item >= args.plans[args.num_seqs].first_item) return;
  const SequencePlan plan = args.plans[find_sequence(args, item)];
  Tile tile(p, plan, args.errors, static_cast<int>(blockIdx.y),
            (item - plan.first_item) * kExtendRows);
  tile.place(0, plan.seq_len);
  tile.attend();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile.first_row + Tile::tile_row(i);
    if (row >= tile.num_rows()) continue;
    const int head = tile.head_of(row);
    const int64_t token = plan.first_row + tile.token_of(row);
    const Denominator by = denominator(p, head, {tile.max[i], tile.sum[i]});
    if (p.lse && Tile::lane() % 4 == 0) p.lse[token * p.num_q_heads + head] = by.lse;
#pragma unroll
    for (int j = 0; j < kMaxDim / 8; ++j) {
      const int dim = j * 8 + Tile::lane() % 4 * 2;
      if (dim < p.kv.layout.head_dim_v) {
        store_pair<kDType>(p, token, head, dim, tile.out[j][2 * i] * by.factor,
                           tile.out[j][2 * i + 1] * by.factor);
      }
    }
  }
}

// Grid: KV heads x tiles of their query heads in x, so that neighbours read the same pages; items
// (splits of sequences) in y, as many as run at once.
template <DType kDType, int kMaxDim>
__global__ void __launch_bounds__(kTileThreads, kResident)
    decode(const __grid_constant__ Args args) {
  using Tile = AttentionTile<kDType, kMaxDim, kDecodeRows / 16>;
  constexpr int kOutStride = kMaxDim + 4;  // rows of a warp's result in shared memory
  static_assert(Tile::kSharedBytes >= sizeof(float) * kTileWarps * kDecodeRows * (kOutStride + 2));
  const PagedAttentionParams& p = args.p;
  const int head_dim_v = p.kv.layout.head_dim_v;
  const int num_items = args.plans[args.num_seqs].first_item;
  auto* outs = reinterpret_cast<float*>(shared_memory());  // [kTileWarps][kDecodeRows][kOutStride]
  auto* states = reinterpret_cast<State*>(outs + kTileWarps * kDecodeRows * kOutStride);
  for (int item = static_cast<int>(blockIdx.y); item < num_items;
       item += static_cast<int>(gridDim.y)) {
    const SequencePlan plan = args.plans[find_sequence(args, item)];
    const int num_kv_heads = p.kv.layout.num_kv_heads;
    Tile tile(p, plan, args.errors, static_cast<int>(blockIdx.x) % num_kv_heads,
              static_cast<int>(blockIdx.x) / num_kv_heads * kDecodeRows);
    const int split = plan.first_split + item - plan.first_item;
    tile.place(split * kSplitTokens, (split + 1) * kSplitTokens);
    tile.attend();
    // Each warp has seen a part of every block.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Tile::warp() * kDecodeRows + Tile::tile_row(i);
      if (Tile::lane() % 4 == 0) states[row] = {tile.max[i], tile.sum[i]};
#pragma unroll
      for (int j = 0; j < kMaxDim / 8; ++j) {
        float* to = outs + row * kOutStride + j * 8 + Tile::lane() % 4 * 2;
        to[0] = tile.out[j][2 * i];
        to[1] = tile.out[j][2 * i + 1];
      }
    }
    __syncthreads();
    for (int row = Tile::warp(); row < kDecodeRows; row += kTileWarps) {
      if (tile.first_row + row >= tile.num_rows()) break;
      State all{-INFINITY, 0.0f};
      float factors[kTileWarps];
#pragma unroll
      for (int i = 0; i < kTileWarps; ++i)
        all.max = fmaxf(all.max, states[i * kDecodeRows + row].max);
#pragma unroll
      for (int i = 0; i < kTileWarps; ++i) {
        const State part = states[i * kDecodeRows + row];
        factors[i] = exp2_fast(part.max - Tile::finite(all.max));
        all.sum += part.sum * factors[i];
      }
      const int64_t at =
          static_cast<int64_t>(item) * p.num_q_heads + tile.head_of(tile.first_row + row);
      if (Tile::lane() == 0) args.states[at] = all;
      for (int dim = Tile::lane(); dim < head_dim_v; dim += 32) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kTileWarps; ++i) {
          sum += outs[(i * kDecodeRows + row) * kOutStride + dim] * factors[i];
        }
        args.outs[at * head_dim_v + dim] = sum;
      }
    }
    __syncthreads();
  }
}

// Grid: a warp for each row of q and query head.
template <DType kDType>
__global__ void __launch_bounds__(kTileThreads) combine_splits(const __grid_constant__ Args args) {
  const PagedAttentionParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int idx = static_cast<int>(blockIdx.x) * kTileWarps + static_cast<int>(threadIdx.x) / 32;
  const int seq = idx / p.num_q_heads, head = idx % p.num_q_heads;
  if (seq >= args.num_seqs) return;
  const SequencePlan plan = args.plans[seq];
  const int num_splits = args.plans[seq + 1].first_item - plan.first_item;
  const int64_t first = static_cast<int64_t>(plan.first_item) * p.num_q_heads + head;
  State all{-INFINITY, 0.0f};
  for (int split = lane; split < num_splits; split += 32) {
    all.max = fmaxf(all.max, args.states[first + static_cast<int64_t>(split) * p.num_q_heads].max);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    all.max = fmaxf(all.max, __shfl_xor_sync(0xffffffffu, all.max, distance));
  }
  const float max = all.max == -INFINITY ? 0.0f : all.max;
  for (int split = 0; split < num_splits; ++split) {
    const State part = args.states[first + static_cast<int64_t>(split) * p.num_q_heads];
    all.sum += part.sum * exp2_fast(part.max - max);
  }
  const Denominator by = denominator(p, head, all);
  if (p.lse && lane == 0) {
    p.lse[static_cast<int64_t>(plan.first_row) * p.num_q_heads + head] = by.lse;
  }
  const int head_dim_v = p.kv.layout.head_dim_v;
  for (int dim = lane * 2; dim < head_dim_v; dim += 64) {
    float a = 0.0f, b = 0.0f;
    for (int split = 0; split < num_splits; ++split) {
      const int64_t at = first + static_cast<int64_t>(split) * p.num_q_heads;
      const float factor = exp2_fast(args.states[at].max - max);
      const float2 part = *reinterpret_cast<const float2*>(args.outs + at * head_dim_v + dim);
      a += part.x * factor;
      b += part.y * factor;
    }
    store_pair<kDType>(p, plan.first_row, head, dim, a * by.factor, b * by.factor);
  }
}

// --- the host
// -------------------------------------------------------------------------------------

constexpr int kMaxDims[] = {64, 128, 256};

struct Instance {
  DType dtype;
  int max_dim;
  void (*decode)(Args);
  void (*extend)(Args);
  void (*combine)(Args);
  size_t decode_shared_bytes, extend_shared_bytes;
};

template <DType kDType, int kMaxDim>
constexpr Instance instance() {
  return {kDType,
          kMaxDim,
          decode<kDType, kMaxDim>,
          extend<kDType, kMaxDim>,
          combine_splits<kDType>,
          AttentionTile<kDType, kMaxDim, kDecodeRows / 16>::kSharedBytes,
          AttentionTile<kDType, kMaxDim, kExtendRows / 16>::kSharedBytes};
}

const Instance kInstances[] = {
    instance<DType::kBFloat16, kMaxDims[0]>(), instance<DType::kBFloat16, kMaxDims[1]>(),
    instance<DType::kBFloat16, kMaxDims[2]>(), instance<DType::kFloat16, kMaxDims[0]>(),
    instance<DType::kFloat16, kMaxDims[1]>(),  instance<DType::kFloat16, kMaxDims[2]>(),
};

bool aligned(const void* data, const Plane& plane) {
  return plane.stride_dim == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         plane.stride_page % 8 == 0 && plane.stride_slot % 8 == 0 && plane.stride_head % 8 == 0;
}

const Instance& find_instance(const PagedAttentionParams& p) {
  const KVLayout& layout = p.kv.layout;
  const int dims = std::max(layout.head_dim, layout.head_dim_v);
  const auto missing = [](const auto&... parts) {
    return Unsupported(concat("paged_attention on CUDA: ", parts...));
  };
  if (!layout.has_v_plane()) throw missing("pool: supported are K and V of their own");
  if (p.q_dtype != layout.dtype || layout.has_scales()) {
    throw missing("q and pool: supported is one dtype, bfloat16 or float16; got ",
                  dtype_name(p.q_dtype), " and ", dtype_name(layout.dtype));
  }
  if (layout.head_dim % 16 != 0 || layout.head_dim_v % 16 != 0) {
    throw missing("head_dim: supported are multiples of 16; got ", layout.head_dim, " and ",
                  layout.head_dim_v);
  }
  if (!aligned(p.kv.k, layout.k) || !aligned(p.kv.v, layout.v)) {
    throw missing("pool: supported are contiguous rows that begin at multiples of 16 bytes");
  }
  if (reinterpret_cast<uintptr_t>(p.q) % 16 != 0 || p.q_stride_token % 8 != 0 ||
      p.q_stride_head % 8 != 0) {
    throw missing("q: supported are rows that begin at multiples of 16 bytes");
  }
  if (reinterpret_cast<uintptr_t>(p.out) % 4 != 0 || p.out_stride_token % 2 != 0 ||
      p.out_stride_head % 2 != 0) {
    throw missing("out: supported are rows that begin at multiples of 4 bytes");
  }
  for (const Instance& each : kInstances) {
    if (each.dtype == p.q_dtype && dims <= each.max_dim) return each;
  }
  throw missing("supported are bfloat16 and float16 and head_dim up to ",
                kMaxDims[std::size(kMaxDims) - 1], "; got ", dtype_name(p.q_dtype), " and ", dims);
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

unsigned num_processors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return static_cast<unsigned>(count);
}

// Sequences [first_seq, first_seq + num_seqs), with at most `max_items` items.
void run(const Instance& with, Args args, int64_t max_items, cudaStream_t stream) {
  const PagedAttentionParams& p = args.p;
  const KVLayout& layout = p.kv.layout;
  const int64_t group = p.num_q_heads / layout.num_kv_heads;
  const int64_t num_states = args.decode ? max_items * p.num_q_heads : 0;
  const int64_t outs_bytes = num_states * layout.head_dim_v * 4;
  const int64_t states_bytes = num_states * static_cast<int64_t>(sizeof(State));
  const Scratch scratch(outs_bytes + states_bytes + (args.num_seqs + 1) * sizeof(SequencePlan),
                        stream);
  args.outs = reinterpret_cast<float*>(scratch.data());
  args.states = reinterpret_cast<State*>(scratch.data() + outs_bytes);
  args.plans = reinterpret_cast<SequencePlan*>(scratch.data() + outs_bytes + states_bytes);
  launch("paged_attention: plan", make_plans, dim3(1), kPlanThreads, 2 * kPlanThreads * sizeof(int),
         stream, args);
  if (max_items == 0) return;
  if (!args.decode) {
    launch("paged_attention: extend", with.extend,
           dim3(static_cast<unsigned>(max_items), static_cast<unsigned>(layout.num_kv_heads)),
           kTileThreads, with.extend_shared_bytes, stream, args);
    return;
  }
  const auto columns = static_cast<unsigned>(layout.num_kv_heads * ceil_div(group, kDecodeRows));
  constexpr unsigned kBlocksEach = 8;  // of a processor; some wait for their turn
  const auto rows = static_cast<unsigned>(
      std::min<int64_t>(max_items, ceil_div(num_processors() * kBlocksEach, columns)));
  launch("paged_attention: decode", with.decode, dim3(columns, rows), kTileThreads,
         with.decode_shared_bytes, stream, args);
  launch("paged_attention: combine", with.combine,
         dim3(static_cast<unsigned>(ceil_div(int64_t{args.num_seqs} * p.num_q_heads, kTileWarps))),
         kTileThreads, 0, stream, args);
}

}  // namespace

void paged_attention(const PagedAttentionParams& params, cudaStream_t stream) {
  check_shapes(params);
  const Instance& with = find_instance(params);
  report_errors();
  if (params.num_tokens == 0) return;
  const KVLayout& layout = params.kv.layout;
  Args args{.p = params,
            .plans = nullptr,
            .states = nullptr,
            .outs = nullptr,
            .errors = error_record(),
            .first_seq = 0,
            .num_seqs = static_cast<int>(params.num_seqs),
            .decode = params.q_indptr == nullptr};
  if (!args.decode) {
    const int64_t rows = params.num_tokens * (params.num_q_heads / layout.num_kv_heads);
    return run(with, args, rows / kExtendRows + params.num_seqs, stream);
  }
  const int64_t splits = ceil_div(params.num_entries * layout.page_size, kSplitTokens);
  if (params.page_indptr) return run(with, args, splits + params.num_seqs, stream);
  // Wide page tables, of which little may be used: no more sequences at a time than fit.
  const int64_t seq_bytes = splits * params.num_q_heads * (layout.head_dim_v + 2) * 4;
  const auto at_once = static_cast<int>(std::clamp<int64_t>(
      kMaxWorkspaceBytes / std::max<int64_t>(seq_bytes, 1), 1, params.num_seqs));
  for (; args.first_seq < params.num_seqs; args.first_seq += at_once) {
    args.num_seqs = std::min(at_once, static_cast<int>(params.num_seqs) - args.first_seq);
    run(with, args, args.num_seqs * splits, stream);
  }
}

}  // namespace kvlink::cuda
