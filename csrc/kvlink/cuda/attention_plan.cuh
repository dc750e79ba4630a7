// The plan of a call with q_indptr: one small kernel, from what only the device knows.
#pragma once

#include "kvlink/cuda/attention_sequence.cuh"
#include "kvlink/cuda/prefill_tiles.cuh"

namespace kvlink::cuda {

inline constexpr int kPlanThreads = 256;

// Sum of `mine` over this thread and those before it; *all: over all. `sums`: [2][kPlanThreads].
__device__ inline int running_sum(int* sums, int mine, int* all) {
  const int thread = static_cast<int>(threadIdx.x);
  int side = 0;
  sums[thread] = mine;
  __syncthreads();
  for (int distance = 1; distance < kPlanThreads; distance *= 2) {
    const int* from = sums + side * kPlanThreads;
    const int sum = from[thread] + (thread >= distance ? from[thread - distance] : 0);
    side = 1 - side;
    sums[side * kPlanThreads + thread] = sum;
    __syncthreads();
  }
  const int mine_too = sums[side * kPlanThreads + thread];
  *all = sums[side * kPlanThreads + kPlanThreads - 1];
  __syncthreads();
  return mine_too;
}

// What a block of threads has to compute of a sequence when all have the same: in tiles times
// splits.
__device__ inline int fair_share(const Args& args, int* sums, int group) {
  int64_t mine = 0;
  for (int seq = static_cast<int>(threadIdx.x); seq < args.num_seqs; seq += kPlanThreads) {
    SequencePlan plan = check_sequence(args, args.first_seq + seq);
    find_splits(args, &plan);
    const int tiles = (plan.num_rows * group + args.tile_rows - 1) / args.tile_rows;
    mine += static_cast<int64_t>(tiles) * plan.num_splits;
  }
  constexpr int64_t kMost = INT32_MAX / kPlanThreads / 2;  // twice the sum fits
  int all;
  running_sum(sums, static_cast<int>(mine < kMost ? mine : kMost), &all);
  return all / args.share_blocks;
}

// One block. It waits for what `ready` says; when that does not come, no sequence sees anything.
//
// Rows of a sequence in few tiles go split by split, as long as there are slots for their
// states; others walk all they see and fold on the way, with the same bits.
static __global__ void __launch_bounds__(kPlanThreads)
    make_plans(const __grid_constant__ Args args) {
  auto* sums = reinterpret_cast<int*>(shared_memory());  // [2][kPlanThreads]
  const int thread = static_cast<int>(threadIdx.x);
  int* is_ready = sums + 2 * kPlanThreads;
  if (thread == 0) *is_ready = wait_ready(args.ready, args.errors);
  __syncthreads();
  const bool ready = *is_ready != 0;
  const int group = args.p.num_q_heads / args.p.kv.layout.num_kv_heads;
  // Dividing costs memory traffic, and is no use to a sequence that is little of a block's share.
  const int most_walked =
      ready && args.share_blocks > 0 ? fair_share(args, sums, group) * 2 / 3 : 0;
  SequencePlan before{};
  for (int first = 0; first < args.num_seqs; first += kPlanThreads) {
    const int seq = first + thread;
    SequencePlan plan{};
    if (seq < args.num_seqs) {
      plan = check_sequence(args, args.first_seq + seq);
      if (!ready) plan.seq_len = 0;
      find_splits(args, &plan);
    }
    int all;
    const int all_rows = plan.num_rows * group, rows = all_rows > args.most_rows ? 0 : all_rows;
    const int tiles = (rows + args.tile_rows - 1) / args.tile_rows;
    const bool divides =
        plan.num_splits > 1 && tiles <= kMaxSplitTiles && plan.num_splits > most_walked;
    const int64_t wanted = divides ? static_cast<int64_t>(rows) * plan.num_splits : 0;
    const int slots = wanted <= args.max_slots ? static_cast<int>(wanted) : args.max_slots + 1;
    // NOTE: at most kPlanThreads times max_slots + 1, which fits.
    const int end = before.first_slot + running_sum(sums, slots, &all);
    plan.first_slot = end - slots;
    before.first_slot =
        before.first_slot + all <= args.max_slots ? before.first_slot + all : args.max_slots + 1;
    const bool divided = divides && end <= args.max_slots;
    if (!divided) plan.num_splits = 1;
    const int items = tiles * plan.num_splits, folded = divided ? rows : 0;
    plan.first_folded = before.first_folded + running_sum(sums, folded, &all) - folded;
    before.first_folded += all;
    plan.first_item = before.first_item + running_sum(sums, items, &all) - items;
    before.first_item += all;
    if (seq < args.num_seqs) args.plans[seq] = plan;
  }
  if (thread == 0) args.plans[args.num_seqs] = before;
  if (!args.prefill) return;
  const auto prefill_rows = [&](const SequencePlan& plan) {
    const int rows = plan.num_rows * group;
    return rows > args.most_rows ? rows : 0;
  };
  list_prefill_tiles(args.p, args.plans, args.num_seqs, prefill_rows, sums, args.prefill);
}

}  // namespace kvlink::cuda
