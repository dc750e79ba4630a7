// Tiles of many query rows on tensor cores of sm_90a: wgmma fed by bulk copies.
//
// A block is three warp groups. One warp of the first copies blocks of K and V, page by page, into
// a ring of stages in shared memory, swizzled as products read them. The other two groups have 64
// of a tile's 128 rows each; these are (new token, query head of one KV head) pairs. A group's
// products of the next block's scores and of this block's values run while it turns scores into
// weights, and the two groups take turns, so that one's products run beside the other's softmax.
// Blocks of positions are counted from position 0 and taken from the last to the first, as many as
// any row of the tile sees. As many blocks as there are processors walk the list of tiles.
//
// Budgets. Registers: 128 threads x 24 and 256 x 240, which is 384 x 168; of a thread's, sums take
// 128 at head_dim 128 (64 scores, 64 outputs) and weights 32, or twice that in two parts.
// Shared memory, of 232448 bytes that a block may have (Q + stages x (K + V), and barriers):
//   head_dim  64: 16 + 4 x (16 + 16) = 144 KiB, blocks of 128 positions
//   head_dim 128: 32 + 3 x (32 + 32) = 224 KiB, blocks of 128
//   head_dim 256: 64 + 2 x (32 + 32) = 192 KiB, blocks of 64
// Limit: per block of 128 positions at head_dim 128, a tile's products are 8.4 million operations,
// 2048 cycles at a processor's 4096 a cycle; its 16384 exponentials are 1024 cycles at 16 a cycle;
// and it reads 64 KiB, 32 bytes a cycle, from L2.
#pragma once

#include "kvlink/cuda/group_rows.cuh"
#include "kvlink/cuda/paged_attention_sm90.hpp"

namespace kvlink::cuda {

inline constexpr int kGroups = kPrefillRows / kGroupRows;
inline constexpr int kTurn = 1, kOwn = kTurn + kGroups;  // named barriers, one for each group

struct PrefillArgs {
  TensorMap k_map, v_map;
  PagedAttentionParams p;
  const SequencePlan* plans;
  const PrefillTile* tiles;
  ErrorRecord* errors;
  int box_tokens;  // of a bulk copy: divides a page and a block
};

// What the warp that copies and those that compute share, and the former's part.
template <int kDim, int kDimV>
struct PrefillRing {
  static constexpr int kTokens = kDimV > 128 ? 64 : 128;  // of a block
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;
  static constexpr int kQueriesBytes = kGroupRows * kDim * 2;  // of a group
  static constexpr int kKeysBytes = kTokens * kDim * 2, kValuesBytes = kTokens * kDimV * 2;
  static constexpr int kBarriersAt =
      kGroups * kQueriesBytes + kStages * (kKeysBytes + kValuesBytes);
  static constexpr size_t kSharedBytes = kBarriersAt + 4 * kStages * sizeof(uint64_t);
  static_assert(kSharedBytes <= kMaxBlockBytes);

  const PrefillArgs& args;
  const PagedAttentionParams& p;
  int thread;  // of the warp group
  int group;   // of the two that compute

  __device__ PrefillRing(const PrefillArgs& all, int own_group)
      : args(all),
        p(all.p),
        thread(static_cast<int>(threadIdx.x) % kGroupThreads),
        group(own_group) {}

  __device__ static char* queries(int group) {
    return swizzled_shared_memory() + group * kQueriesBytes;
  }
  __device__ static char* keys(int stage) { return queries(kGroups) + stage * kKeysBytes; }
  __device__ static char* values(int stage) { return keys(kStages) + stage * kValuesBytes; }
  __device__ static uint64_t* barriers() {
    return reinterpret_cast<uint64_t*>(swizzled_shared_memory() + kBarriersAt);
  }
  __device__ static uint64_t* keys_full(int stage) { return barriers() + stage; }
  __device__ static uint64_t* values_full(int stage) { return keys_full(kStages) + stage; }
  __device__ static uint64_t* keys_free(int stage) { return values_full(kStages) + stage; }
  __device__ static uint64_t* values_free(int stage) { return keys_free(kStages) + stage; }

  // Block n of those that the thread block has taken, and the parity of its stage's phase.
  __device__ static int stage_of(int n) { return n % kStages; }
  __device__ static int parity_of(int n) { return n / kStages % 2; }

  __device__ int lane() const { return thread % 32; }
  __device__ int rows_begin() const { return group * kGroupRows; }
  __device__ int dims_begin() const { return 0; }
  __device__ char* own_queries() const { return queries(group); }
  __device__ void sync_group() const { sync_named(kOwn + group, kGroupThreads); }

  // By one thread, before anything else.
  __device__ static void init_barriers() {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(keys_full(stage), 1);
      init_barrier(values_full(stage), 1);
      init_barrier(keys_free(stage), kGroups * kGroupThreads / 32);
      init_barrier(values_free(stage), kGroups * kGroupThreads / 32);
    }
    publish_barriers();
  }

  // The thread block's work of a round, every other one backwards so that sums are alike; false:
  // there is none, nor in later rounds.
  __device__ bool find_work(int round, TileWork& work) const {
    const int num_heads = p.kv.layout.num_kv_heads;
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int item = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    if (item >= args.tiles[0].seq * num_heads) return false;
    const PrefillTile tile = args.tiles[1 + item / num_heads];
    work.seq = args.plans[tile.seq];
    work.kv_head = item % num_heads;
    work.first_row = tile.first_row;
    const Range range = tile_range(p, work.seq, tile.first_row, kPrefillRows);
    work.first_position = range.begin;
    work.first_block = range.begin / kTokens;
    work.end_block = range.end > range.begin ? (range.end - 1) / kTokens + 1 : work.first_block;
    return true;
  }

  // --- the warp that copies

  // Of the lane's part of a block; the pool's number of pages, outside of the tensor, for none.
  __device__ int page_of(const TileWork& work, int block) const {
    const int none = static_cast<int>(p.kv.num_pages);
    const int position = block * kTokens + lane() * args.box_tokens;
    if (block < work.first_block || lane() * args.box_tokens >= kTokens ||
        position + args.box_tokens <= work.first_position || position >= work.seq.seq_len) {
      return none;
    }
    const int64_t entry = work.seq.first_entry + position / p.kv.layout.page_size;
    const int page = p.page_table[entry];
    if (page >= 0 && page < p.kv.num_pages) return page;
    record_error(args.errors, BadEntry::kPageTable, entry, page);
    return none;
  }

  __device__ void copy_part(char* stage, const TensorMap* map, int dims, const TileWork& work,
                            int block, int page, uint64_t* full) const {
    const int first = lane() * args.box_tokens;
    if (first < kTokens) {
      const int slot = (block * kTokens + first) % p.kv.layout.page_size;
      for (int dim = 0; dim < dims; dim += 64) {
        copy_box(stage + (dim / 64 * kTokens + first) * kRowBytes, map,
                 {dim, slot, work.kv_head, page}, full);
      }
    }
  }

  __device__ void copy_all() const {
    TileWork work;
    int n = 0;
    for (int round = 0; find_work(round, work); ++round) {
      int page = page_of(work, work.end_block - 1);
      for (int block = work.end_block - 1; block >= work.first_block; --block, ++n) {
        const int stage = stage_of(n);
        const int next_page = page_of(work, block - 1);
        wait_phase(keys_free(stage), parity_of(n) ^ 1);
        if (lane() == 0) arrive_expecting(keys_full(stage), kKeysBytes);
        __syncwarp();
        copy_part(keys(stage), &args.k_map, kDim, work, block, page, keys_full(stage));
        wait_phase(values_free(stage), parity_of(n) ^ 1);
        if (lane() == 0) arrive_expecting(values_full(stage), kValuesBytes);
        __syncwarp();
        copy_part(values(stage), &args.v_map, kDimV, work, block, page, values_full(stage));
        page = next_page;
      }
    }
  }
};

}  // namespace kvlink::cuda
