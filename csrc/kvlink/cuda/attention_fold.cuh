// What extend computed by splits, put together in rising order.
#pragma once

#include "kvlink/cuda/attention_args.cuh"

namespace kvlink::cuda {

inline constexpr int kFoldThreads = 128;

// A warp for each row whose splits were stored, over all KV heads.
static __global__ void __launch_bounds__(kFoldThreads)
    fold_splits(const __grid_constant__ Args args) {
  const PagedAttentionParams& p = args.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_kv_heads = p.kv.layout.num_kv_heads, head_dim_v = p.kv.layout.head_dim_v;
  const int group = p.num_q_heads / num_kv_heads;
  const int64_t num_rows =
      static_cast<int64_t>(args.plans[args.num_seqs].first_folded) * num_kv_heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kFoldThreads / 32);
  for (int64_t idx = static_cast<int64_t>(blockIdx.x) * (kFoldThreads / 32) + threadIdx.x / 32;
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

}  // namespace kvlink::cuda
