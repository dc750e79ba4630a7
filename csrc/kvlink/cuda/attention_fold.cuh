// What was computed by splits, put together in rising order.
#pragma once

#include "kvlink/cuda/attention_args.cuh"

namespace kvlink::cuda {

inline constexpr int kCombineThreads = 128;

// A warp for each row whose splits were stored, over all KV heads.
static __global__ void __launch_bounds__(kCombineThreads)
    fold_splits(const __grid_constant__ Args args) {
  const PagedAttentionParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_kv_heads = p.kv.layout.num_kv_heads, head_dim_v = p.kv.layout.head_dim_v;
  const int group = p.num_q_heads / num_kv_heads;
  const int64_t num_rows =
      static_cast<int64_t>(args.plans[args.num_seqs].first_folded) * num_kv_heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kCombineThreads / 32);
  for (int64_t idx = static_cast<int64_t>(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
       idx < num_rows; idx += step) {
    const int folded = static_cast<int>(idx / num_kv_heads),
              kv_head = static_cast<int>(idx % num_kv_heads);
    const SequencePlan plan = args.plans[find_sequence(args, folded, &SequencePlan::first_folded)];
    const int row = folded - plan.first_folded;
    const int64_t first = plan.first_slot + static_cast<int64_t>(row) * plan.num_splits;
    const int64_t token = plan.first_row + row / group;
    const int head = kv_head * group + row % group;
    State all{-INFINITY, 0.0f};
    for (int split = 0; split < plan.num_splits; ++split) {
      fold(all, args.states[(first + split) * num_kv_heads + kv_head]);
    }
    const Denominator by = denominator(p, head, all);
    if (p.lse && lane == 0) p.lse[token * p.num_q_heads + head] = by.lse;
    for (int dim = lane; dim < head_dim_v; dim += 32) {
      State state{-INFINITY, 0.0f};
      float sum = 0.0f;
      for (int split = 0; split < plan.num_splits; ++split) {
        const int64_t at = (first + split) * num_kv_heads + kv_head;
        const Fold factors = fold(state, args.states[at]);
        sum = fold(sum, args.outs[at * head_dim_v + dim], factors);
      }
      store_out(p, token, head, dim, sum * by.factor);
    }
  }
}

// Grid: a warp for each row of q and query head.
static __global__ void __launch_bounds__(kCombineThreads)
    combine_splits(const __grid_constant__ Args args) {
  const PagedAttentionParams& p = args.p;
  constexpr int kWarps = kCombineThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int idx = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
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
  const float max = finite(all.max);
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
    store_pair(p, plan.first_row, head, dim, a * by.factor, b * by.factor);
  }
}

}  // namespace kvlink::cuda
