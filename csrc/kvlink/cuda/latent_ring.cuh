// Latent pages (MLA) on tensor cores of sm_90a: each block of positions is in shared memory once,
// as K and, its first dims, as V.
//
// A block is three warp groups. One warp of the first takes items of work (64 query rows of a
// sequence, over all that they see or over one split of it) and copies their blocks of 64
// positions, in parts of 64 dims, into two stages. The other two groups both have the item's 64
// rows, and half of the output's dims each. Blocks of even index are weighed by the first, odd ones
// by the second: that group multiplies queries and block, and gives the weights, 16-bit, to the
// other through shared memory. So a group, for a block of its own:
//   begins the scores; takes the other's weights of the block before, and begins their product with
//   its half of that block's values; meanwhile turns the scores into weights; and begins their
//   product with its half of the block.
// One group's softmax thus lies beside the other's scores. A stage's halves are free, and copied
// anew, as soon as the group that has those dims is done with them.
//
// Budgets. Registers: 128 of outputs, 32 of scores, 16 of weights and 16 of the other's weights, of
// the 232 that each thread of two warp groups may have. Shared memory, of 232448 bytes: queries 72
// KiB, stages 2 x 72 KiB, weights 8 KiB + 2 KiB of maxima.
// Limit: per block, products are 64 x 64 x (576 + 512) x 2 = 8.9 million operations, 2176 cycles at
// a processor's 4096 a cycle; they read 16 KiB of shared memory for each 64 dims of the scores
// (1152 cycles in all at 128 bytes a cycle), 64 KiB for the values (512), and 72 KiB are copied in
// (576), so shared memory is as busy as the tensor cores. 4096 exponentials are 256 cycles. From L2
// a processor reads 34 bytes a cycle, from memory half of that if two blocks of rows share a
// sequence.
#pragma once

#include "kvlink/cuda/group_rows.cuh"

namespace kvlink::cuda {

inline constexpr int kLatentParts = 9, kLatentValueParts = 8;  // of 64 dims
inline constexpr int kLatentTokens = 64;                       // of a block
inline constexpr int kLatentGroups = 2;
inline constexpr int kLatentSplitTokens = 2048;

struct LatentArgs {
  TensorMap map;
  Args all;
  int box_tokens;  // of a bulk copy: divides a page and a block
};

struct LatentWork : TileWork {
  int split;   // the item's only one; -1: it walks all that there are
  bool ended;  // there is no more work
};

struct LatentRing {
  static constexpr int kStages = 2, kItems = 2;
  static constexpr int kPartBytes = kLatentTokens * kRowBytes;
  static constexpr int kStageBytes = kLatentParts * kPartBytes;
  static constexpr int kGroupParts = kLatentValueParts / kLatentGroups;
  static constexpr int kQueriesBytes = kLatentParts * kGroupRows * kRowBytes;
  static constexpr int kWeightsAt = kQueriesBytes + kStages * kStageBytes;
  static constexpr int kWeightsBytes = kGroupRows * kLatentTokens * 2;
  static constexpr int kMaximaAt = kWeightsAt + kWeightsBytes;
  static constexpr int kBarriersAt = kMaximaAt + kGroupThreads * static_cast<int>(sizeof(float4));
  static constexpr int kBarriers = kStages * (kLatentParts + kLatentGroups + 1) + 2 * kItems;
  static constexpr int kItemsAt = kBarriersAt + kBarriers * static_cast<int>(sizeof(uint64_t));
  static constexpr size_t kSharedBytes = kItemsAt + kItems * sizeof(LatentWork);
  static_assert(kSharedBytes <= kMaxBlockBytes);
  static constexpr int kOwn = 1, kGiven = kOwn + kLatentGroups;  // named barriers, one for each
  static constexpr int kBoth = kGiven + kLatentGroups;           // group, and one for both

  const LatentArgs& args;
  const PagedAttentionParams& p;
  int thread;  // of the warp group
  int group;   // of the two that compute

  __device__ LatentRing(const LatentArgs& of_call, int own_group)
      : args(of_call),
        p(of_call.all.p),
        thread(static_cast<int>(threadIdx.x) % kGroupThreads),
        group(own_group) {}

  __device__ static char* own_queries() { return swizzled_shared_memory(); }
  __device__ static char* part_at(int stage, int part) {
    return own_queries() + kQueriesBytes + stage * kStageBytes + part * kPartBytes;
  }
  // [4][kGroupThreads] and [kGroupThreads]: what a thread gives to its counterpart.
  __device__ static uint4* given_weights() {
    return reinterpret_cast<uint4*>(own_queries() + kWeightsAt);
  }
  __device__ static float4* given_maxima() {
    return reinterpret_cast<float4*>(own_queries() + kMaximaAt);
  }
  __device__ static uint64_t* barriers() {
    return reinterpret_cast<uint64_t*>(own_queries() + kBarriersAt);
  }
  __device__ static uint64_t* full(int stage, int part) {
    return barriers() + stage * kLatentParts + part;
  }
  // Of the values of a group; of the last part, for kLatentGroups.
  __device__ static uint64_t* free(int stage, int share) {
    return full(kStages, 0) + stage * (kLatentGroups + 1) + share;
  }
  __device__ static uint64_t* item_full(int turn) { return free(kStages, 0) + turn % kItems; }
  __device__ static uint64_t* item_free(int turn) { return item_full(0) + kItems + turn % kItems; }
  __device__ static LatentWork* item_at(int turn) {
    return reinterpret_cast<LatentWork*>(own_queries() + kItemsAt) + turn % kItems;
  }

  // Block n of those that the thread block has taken, and the parity of its stage's phase.
  __device__ static int stage_of(int n) { return n % kStages; }
  __device__ static int parity_of(int n) { return n / kStages % 2; }
  // The group that weighs a block: by the block, so that sums do not depend on what was before.
  __device__ static int owner_of(int block) { return block % kLatentGroups; }
  // The i-th part of a block that is copied, and multiplied for its scores: the owner's half is
  // free first.
  __device__ static int part_of(int owner, int i) {
    if (i == kGroupParts) return kLatentValueParts;
    return i < kGroupParts ? owner * kGroupParts + i
                           : (1 - owner) * kGroupParts + i - kGroupParts - 1;
  }

  __device__ int rows_begin() const { return 0; }
  __device__ int dims_begin() const { return group * kGroupParts * 64; }
  __device__ void sync_group() const { sync_named(kOwn + group, kGroupThreads); }
  __device__ void sync_both() const { sync_named(kBoth, kLatentGroups * kGroupThreads); }

  // By one thread, before anything else.
  __device__ static void init_barriers() {
    constexpr int kWarps = kGroupThreads / 32;
    for (int stage = 0; stage < kStages; ++stage) {
      for (int part = 0; part < kLatentParts; ++part) init_barrier(full(stage, part), 1);
      for (int share = 0; share <= kLatentGroups; ++share) init_barrier(free(stage, share), kWarps);
    }
    for (int i = 0; i < kItems; ++i) {
      init_barrier(item_full(i), 1);
      init_barrier(item_free(i), kLatentGroups * kWarps);
    }
    publish_barriers();
  }

  // --- the warp that copies

  __device__ int lane() const { return thread % 32; }

  // Takes an item, in shared memory; by one lane.
  __device__ void take_item(LatentWork& work) const {
    const Args& all = args.all;
    SequencePlan& totals = all.plans[all.num_seqs];
    const int taken = atomicAdd(&totals.taken, 1), num_heads = p.kv.layout.num_kv_heads;
    work.ended = taken >= totals.first_item * num_heads;
    if (work.ended) return;
    const int item = totals.first_item - 1 - taken / num_heads;  // the last rows see the most
    work.seq = all.plans[find_sequence(all, item)];
    work.kv_head = taken % num_heads;
    const int local = item - work.seq.first_item, num_splits = work.seq.num_splits;
    work.first_row = local / num_splits * kGroupRows;
    work.split = num_splits > 1 ? local % num_splits : -1;
    Range range = tile_range(p, work.seq, work.first_row, kGroupRows);
    if (num_splits > 1) {
      const int first = (work.seq.first_split + work.split) * kLatentSplitTokens;
      range.begin = std::max(range.begin, first);
      range.end = std::min(range.end, first + kLatentSplitTokens);
    }
    work.first_position = range.begin;
    work.first_block = range.begin / kLatentTokens;
    work.end_block =
        range.end > range.begin ? (range.end - 1) / kLatentTokens + 1 : work.first_block;
  }

  // Of the lane's share of a block; the pool's number of pages, outside of the tensor, for none.
  __device__ int page_of(const LatentWork& work, int block) const {
    const int none = static_cast<int>(p.kv.num_pages);
    const int position = block * kLatentTokens + lane() * args.box_tokens;
    if (block >= work.end_block || lane() * args.box_tokens >= kLatentTokens ||
        position + args.box_tokens <= work.first_position || position >= work.seq.seq_len) {
      return none;
    }
    const int64_t entry = work.seq.first_entry + position / p.kv.layout.page_size;
    const int page = p.page_table[entry];
    if (page >= 0 && page < p.kv.num_pages) return page;
    record_error(args.all.errors, BadEntry::kPageTable, entry, page);
    return none;
  }

  // Into the second cache, so that copies later find it there.
  __device__ void fetch_block(const LatentWork& work, int block, int page) const {
    const int first = lane() * args.box_tokens;
    if (first >= kLatentTokens || page >= p.kv.num_pages) return;
    const int slot = (block * kLatentTokens + first) % p.kv.layout.page_size;
#pragma unroll 1
    for (int part = 0; part < kLatentParts; ++part) {
      prefetch_box(&args.map, {part * 64, slot, work.kv_head, page});
    }
  }

  __device__ void copy_block(const LatentWork& work, int block, int page, int n) const {
    const int stage = stage_of(n), owner = owner_of(block), first = lane() * args.box_tokens;
    const int slot = (block * kLatentTokens + first) % p.kv.layout.page_size;
#pragma unroll 1
    for (int i = 0; i < kLatentParts; ++i) {
      const int part = part_of(owner, i);
      if (i == 0 || i == kGroupParts || i == kGroupParts + 1) {
        wait_phase(free(stage, part / kGroupParts), parity_of(n) ^ 1);
      }
      if (lane() == 0) arrive_expecting(full(stage, part), kPartBytes);
      __syncwarp();
      if (first < kLatentTokens) {
        copy_box(part_at(stage, part) + first * kRowBytes, &args.map,
                 {part * 64, slot, work.kv_head, page}, full(stage, part));
      }
    }
  }

  __device__ void copy_all() const {
    for (int turn = 0, n = 0;; ++turn) {
      wait_phase(item_free(turn), turn / kItems % 2 ^ 1);
      const LatentWork& work = *item_at(turn);
      if (lane() == 0) {
        take_item(*item_at(turn));
        arrive(item_full(turn));
      }
      __syncwarp();
      if (work.ended) return;
      int page = page_of(work, work.first_block), next = page_of(work, work.first_block + 1);
      fetch_block(work, work.first_block, page);
      fetch_block(work, work.first_block + 1, next);
      for (int block = work.first_block; block < work.end_block; ++block, ++n) {
        const int after = page_of(work, block + 2);
        fetch_block(work, block + 2, after);
        copy_block(work, block, page, n);
        page = next, next = after;
      }
    }
  }
};

}  // namespace kvlink::cuda
