// The tiles of query rows that the sm_90a kernel of paged_attention takes, those with the most work
// first.
#pragma once

#include <algorithm>

#include "kvlink/cuda/attention_args.cuh"

namespace kvlink::cuda {

inline constexpr int kPrefillRows = 128;  // of a tile: two warp groups of 64
inline constexpr int kPrefillUnit = 64;   // positions, for comparing work

// A list of them begins with {their number, 0}.
struct PrefillTile {
  int32_t seq, first_row;  // first_row: of the sequence's rows times heads of a KV head
};

// What a tile's rows see together.
__device__ inline Range tile_range(const PagedAttentionParams& p, const SequencePlan& seq,
                                   int first_row, int num_rows) {
  const int group = p.num_q_heads / p.kv.layout.num_kv_heads;
  const int last_row = std::min(first_row + num_rows, seq.num_rows * group) - 1;
  const int first_position = seq.seq_len - seq.num_rows;
  const Range first = visible(p, first_position + first_row / group, seq.seq_len);
  const Range last = visible(p, first_position + last_row / group, seq.seq_len);
  return {first.begin, last.end};
}

// 0 to 255, rising with n: the highest bit that is set and the three after it.
__device__ inline int logarithmic(int n) {
  int high = 0;
  while (n >> high >= 16) ++high;
  return high * 8 + (n >> high);
}

// By one block of 256 threads; `counts` [256] in shared memory. `num_rows(plan)` rows of a sequence
// are tiled.
template <typename NumRows>
__device__ void list_prefill_tiles(const PagedAttentionParams& p, const SequencePlan* plans,
                                   int num_seqs, NumRows num_rows, int* counts,
                                   PrefillTile* tiles) {
  constexpr int kThreads = 256;
  const int thread = static_cast<int>(threadIdx.x);
  const int width = num_seqs < kThreads / 32 ? kThreads : 32;  // threads to a sequence
  const auto each_tile = [&](auto&& work) {
    for (int seq = thread / width; seq < num_seqs; seq += kThreads / width) {
      const SequencePlan plan = plans[seq];
      const int end = num_rows(plan);
      for (int row = thread % width * kPrefillRows; row < end; row += width * kPrefillRows) {
        const Range range = tile_range(p, plan, row, kPrefillRows);
        work(PrefillTile{seq, row}, 255 - logarithmic((range.end - range.begin) / kPrefillUnit));
      }
    }
  };
  counts[thread] = 0;
  __syncthreads();
  each_tile([&](PrefillTile, int bin) { atomicAdd(&counts[bin], 1); });
  __syncthreads();
  if (thread < 32) {  // a running sum
    constexpr int kBins = kThreads / 32;
    int sum = 0;
    for (int i = 0; i < kBins; ++i) sum += counts[thread * kBins + i];
    int before = sum;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, distance);
      if (thread >= distance) before += other;
    }
    if (thread == 31) tiles[0] = {before, 0};
    before -= sum;
    for (int i = 0; i < kBins; ++i) {
      const int count = counts[thread * kBins + i];
      counts[thread * kBins + i] = before;
      before += count;
    }
  }
  __syncthreads();
  each_tile([&](PrefillTile tile, int bin) { tiles[1 + atomicAdd(&counts[bin], 1)] = tile; });
}

}  // namespace kvlink::cuda
