// The kernel of calls without q_indptr, one launch: each block counts the call's items (splits of
// sequences) by itself and takes some of them; who ends the last split of a row puts all of the
// row's together.
#pragma once

#include "kvlink/cuda/attention_sequence.cuh"
#include "kvlink/cuda/attention_tile.cuh"

namespace kvlink::cuda {

inline constexpr int kDecodeThreads = 128;

// The items of a call in the order of its sequences. A sequence that sees nothing has one, too: its
// rows are written.
class DecodeItems {
 public:
  static constexpr size_t kSharedBytes = (kDecodeThreads + 2) * sizeof(int);

  // By all threads of the block.
  __device__ DecodeItems(const Args& args, int* shared) : args_(args), starts_(shared) {
    count(!args.verdict || *args.verdict != 0);
    // NOTE: so many only if page_indptr is wrong, which has been recorded.
    if (total() > args.max_items) count(false);
  }

  __device__ int total() const { return starts_[kDecodeThreads]; }

  // What its rows see together.
  __device__ SequencePlan sequence(int seq) const {
    SequencePlan plan = check_sequence(args_, args_.first_seq + seq);
    if (starts_[kDecodeThreads + 1] == 0) plan.seq_len = 0;
    find_splits(args_, &plan);
    return plan;
  }

  // The sequence that an item belongs to, and that sequence's first item. By whole warps.
  __device__ int find(int item, int* first_item) const {
    int low = 0, high = kDecodeThreads - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (starts_[middle] <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    *first_item = starts_[low];
    if (run() == 1) return low;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int end = (low + 1) * run() < args_.num_seqs ? (low + 1) * run() : args_.num_seqs;
    for (int first = low * run(); first < end; first += 32) {
      const int mine = first + lane < end ? num_items(first + lane) : 0;
      const int sum = sum_of_lanes(mine, lane);
      const unsigned beyond = __ballot_sync(0xffffffffu, *first_item + sum > item);
      if (beyond != 0) {
        const int found = __ffs(static_cast<int>(beyond)) - 1;
        *first_item += __shfl_sync(0xffffffffu, sum - mine, found);
        return first + found;
      }
      *first_item += __shfl_sync(0xffffffffu, sum, 31);
    }
    return end - 1;  // NOTE: only if seq_lens have changed since they were counted.
  }

 private:
  // Sequences of which a thread counts the items.
  __device__ int run() const { return (args_.num_seqs + kDecodeThreads - 1) / kDecodeThreads; }

  // `sees`: whether any sequence does.
  __device__ void count(bool sees) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    __syncthreads();
    if (thread == 0) starts_[kDecodeThreads + 1] = sees;
    __syncthreads();
    constexpr int kMany =
        1 << 23;  // more than there is memory for; as many from all do not overflow
    int sum = 0;
    for (int i = 0; i < run(); ++i) sum = std::min(sum + num_items(thread * run() + i), kMany);
    sum = sum_of_lanes(sum, lane);
    starts_[thread + 1] = sum;
    __syncthreads();
    for (int warp = 1; warp <= thread / 32; ++warp) sum += starts_[warp * 32];
    __syncthreads();
    starts_[thread + 1] = sum;
    if (thread == 0) starts_[0] = 0;
    __syncthreads();
  }

  __device__ int num_items(int seq) const {
    if (seq >= args_.num_seqs) return 0;
    const int num_splits = sequence(seq).num_splits;
    return num_splits > 1 ? num_splits : 1;
  }

  // Of this lane and those before it.
  __device__ static int sum_of_lanes(int sum, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    return sum;
  }

  const Args& args_;
  int* starts_;  // [kDecodeThreads + 1] items before each thread's run of sequences; then `sees`
};

// A row's splits, stored by any blocks, put together in rising order; a warp's work. (Inlined, it
// takes registers from attend.)
__device__ __noinline__ inline void fold_row(const Args& args, int token, int head,
                                             int64_t first_item, int num_splits) {
  constexpr int kTogether = 8;  // splits of which values are on their way
  const PagedAttentionParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, head_dim_v = p.kv.layout.head_dim_v;
  const auto state_of = [&](int split) -> State {
    if (split >= num_splits) return {-INFINITY, 0.0f};
    const float2 pair =
        load_pair_of_blocks(args.states + (first_item + split) * p.num_q_heads + head);
    return {pair.x, pair.y};
  };
  State all{-INFINITY, 0.0f};
  for (int split = lane; split < num_splits; split += 32) {
    all.max = fmaxf(all.max, state_of(split).max);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    all.max = fmaxf(all.max, __shfl_xor_sync(0xffffffffu, all.max, distance));
  }
  const float max = finite(all.max);
  for (int split = lane; split < num_splits; split += 32) {
    const State part = state_of(split);
    all.sum += part.sum * exp2_fast(part.max - max);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    all.sum += __shfl_xor_sync(0xffffffffu, all.sum, distance);
  }
  const Denominator by = denominator(p, head, all);
  if (p.lse && lane == 0) p.lse[static_cast<int64_t>(token) * p.num_q_heads + head] = by.lse;
  for (int column = 0; column < head_dim_v; column += 128) {
    const int dim = column + lane * 4;
    const bool inside = dim < head_dim_v;
    const float* parts = args.outs + (first_item * p.num_q_heads + head) * head_dim_v + dim;
    const int64_t step = static_cast<int64_t>(p.num_q_heads) * head_dim_v;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < num_splits; first += 32) {
      const float mine = exp2_fast(state_of(first + lane).max - max);
      const int end = num_splits - first < 32 ? num_splits - first : 32;
      for (int i = 0; i < end; i += kTogether) {
        float4 four[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          four[j] = inside && i + j < end ? load_four_of_blocks(parts + (first + i + j) * step)
                                          : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const float factor = __shfl_sync(0xffffffffu, mine, i + j);
          sum.x = __fmaf_rn(four[j].x, factor, sum.x);
          sum.y = __fmaf_rn(four[j].y, factor, sum.y);
          sum.z = __fmaf_rn(four[j].z, factor, sum.z);
          sum.w = __fmaf_rn(four[j].w, factor, sum.w);
        }
      }
    }
    if (inside) {
      store_pair(p, token, head, dim, sum.x * by.factor, sum.y * by.factor);
      store_pair(p, token, head, dim + 2, sum.z * by.factor, sum.w * by.factor);
    }
  }
}

// What a block keeps of its item in shared memory, since registers are short in attend.
struct DecodeItem {
  int item, seq, first_item, num_splits;
  int is_last;  // of the row's splits that end
};

template <typename Tile>
inline constexpr size_t kDecodeSharedBytes =
    Tile::kSharedBytes + DecodeItems::kSharedBytes + sizeof(DecodeItem);

// Grid: KV heads x tiles of their query heads in x, so that neighbours read the same pages; items
// in y, some for each block.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    decode(const __grid_constant__ Args args) {
  constexpr int kRows = Tile::kRows, kWarps = Tile::kWarps;
  constexpr int kOutStride = Tile::kColumns * 8 + 4;  // rows of a warp's result in shared memory
  static_assert(Tile::kThreads == kDecodeThreads);
  static_assert(Tile::kSharedBytes >= sizeof(float) * kWarps * kRows * (kOutStride + 2));
  static_assert(kDecodeSharedBytes<Tile> <= kMaxSharedBytes);
  const PagedAttentionParams& p = args.p;
  const int head_dim_v = p.kv.layout.head_dim_v, num_kv_heads = p.kv.layout.num_kv_heads;
  auto* outs = reinterpret_cast<float*>(shared_memory());  // [kWarps][kRows][kOutStride]
  auto* states = reinterpret_cast<State*>(outs + kWarps * kRows * kOutStride);
  auto* starts = reinterpret_cast<int*>(shared_memory() + Tile::kSharedBytes);
  auto* kept = reinterpret_cast<DecodeItem*>(starts + DecodeItems::kSharedBytes / sizeof(int));
  const DecodeItems items(args, starts);
  for (int item = static_cast<int>(blockIdx.y); item < items.total();) {
    int first_item;
    const int seq = items.find(item, &first_item);
    const SequencePlan plan = items.sequence(seq);
    if (threadIdx.x == 0) *kept = {item, seq, first_item, plan.num_splits, 0};
    Tile tile(args, plan, static_cast<int>(blockIdx.x) % num_kv_heads,
              static_cast<int>(blockIdx.x) / num_kv_heads * kRows);
    const int first = (plan.first_split + item - first_item) * Tile::kSplitTokens;
    tile.place(kRows, first, first + Tile::kSplitTokens);
    attend(tile, [] {});
    // Each warp has seen a part of every block.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Tile::warp() * kRows + tile.tile_row(i);
      if (tile.owns_state()) states[row] = {tile.max[i], tile.sum[i]};
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          outs[row * kOutStride + tile.dim_of(j, half)] = tile.out[0][j][2 * i + half];
        }
      }
    }
    __syncthreads();
    const int group = p.num_q_heads / num_kv_heads;
    const int first_row = static_cast<int>(blockIdx.x) / num_kv_heads * kRows;
    const int num_rows = group - first_row < kRows ? group - first_row : kRows;
    const int first_head = static_cast<int>(blockIdx.x) % num_kv_heads * group + first_row;
    const int num_splits = kept->num_splits;
    const bool alone = num_splits <= 1;
    for (int row = Tile::warp(); row < num_rows; row += kWarps) {
      State all{-INFINITY, 0.0f};
      float factors[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) all.max = fmaxf(all.max, states[i * kRows + row].max);
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const State part = states[i * kRows + row];
        factors[i] = exp2_fast(part.max - finite(all.max));
        all.sum += part.sum * factors[i];
      }
      const int head = first_head + row;
      const int64_t at = static_cast<int64_t>(kept->item) * p.num_q_heads + head;
      const Denominator by = alone ? denominator(p, head, all) : Denominator{1.0f, 0.0f};
      if (Tile::lane() == 0 && !alone) args.states[at] = all;
      if (Tile::lane() == 0 && alone && p.lse) {
        p.lse[static_cast<int64_t>(args.first_seq + kept->seq) * p.num_q_heads + head] = by.lse;
      }
      for (int dim = Tile::lane(); dim < head_dim_v; dim += 32) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          sum += outs[(i * kRows + row) * kOutStride + dim] * factors[i];
        }
        if (alone) {
          store_out(p, args.first_seq + kept->seq, head, dim, sum * by.factor);
        } else {
          args.outs[at * head_dim_v + dim] = sum;
        }
      }
    }
    if (!alone) {
      __syncthreads();
      if (threadIdx.x == 0) {
        uint32_t* counter =
            args.counters + static_cast<int64_t>(kept->seq) * gridDim.x + blockIdx.x;
        const uint32_t last = static_cast<uint32_t>(num_splits) - 1;
        kept->is_last = take_number(counter, last) == last;
      }
      __syncthreads();
      if (kept->is_last != 0) {
        for (int row = Tile::warp(); row < num_rows; row += kWarps) {
          fold_row(args, args.first_seq + kept->seq, first_head + row, kept->first_item,
                   num_splits);
        }
      }
    }
    item = kept->item + static_cast<int>(gridDim.y);
    __syncthreads();
  }
}

}  // namespace kvlink::cuda
