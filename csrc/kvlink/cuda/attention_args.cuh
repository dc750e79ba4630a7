// What the kernels of paged_attention know of a call and of its sequences.
#pragma once

#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/paged_attention.hpp"
#include "kvlink/cuda/ptx.cuh"
#include "kvlink/cuda/wait_ready.cuh"

namespace kvlink::cuda {

inline constexpr size_t kMaxSharedBytes = 163 << 10;  // of a block, on sm_80
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.693147180559945309417f;
inline constexpr int kDecodeSplitTokens = 512;  // counted from position 0, as all splits are
inline constexpr int kMaxSplitTiles = 8;        // a sequence of more never goes split by split

// Softmax of one row over some positions: sum is of 2^(score - max), out is weighted the same way.
struct State {
  float max, sum;  // sum 0: has seen nothing
};

// A sequence as the device has checked it.
struct SequencePlan {
  int64_t first_entry;     // of the page table
  int64_t first_expected;  // of the expected generations
  int32_t first_item;      // extend: work items of the sequences before it
  int32_t first_slot;      // extend: states of the sequences before it
  int32_t first_folded;    // extend: rows whose splits are folded later, before it
  int32_t first_split;     // that any row sees
  int32_t num_splits;      // that its rows see together; extend: items that a tile is divided into
  int32_t seq_len;
  int32_t first_row, num_rows;  // of q
  int32_t mask_start;
  int32_t taken;  // of the totals: items that blocks have taken (latent_ring.cuh)
};

struct PrefillTile;

struct Args {
  PagedAttentionParams p;
  ReadyCounters ready;
  State* states;  // decode: [items, num_q_heads]; extend: [slots, num_kv_heads]
  float* outs;    // as states, of head_dim_v each
  ErrorRecord* errors;
  int num_seqs;
  int split_tokens;
  // decode
  int first_seq;
  int max_items;       // for which there are states
  int* verdict;        // of await_ready; null: nothing was to be waited for
  uint32_t* counters;  // [num_seqs, grid's x] of splits that are done: 0 when a kernel begins
  // extend
  SequencePlan* plans;  // [num_seqs + 1]; the last has only the totals
  float4* running;      // what a block has folded so far, if a tile walks several splits
  int tile_rows, max_slots;
  int share_blocks;      // to give equal shares to; 0: divides whatever may be divided
  PrefillTile* prefill;  // of sequences that paged_attention_sm90 takes; null: none
  int most_rows;         // sequences of more rows times heads are among these
};

// Positions [begin, end).
struct Range {
  int begin, end;
};

__device__ inline Range visible(const PagedAttentionParams& p, int position, int seq_len) {
  if (position < 0) return {0, 0};
  const int end = p.causal && position < seq_len ? position + 1 : seq_len;
  const int64_t first = static_cast<int64_t>(position) - p.window + 1;
  const int begin = p.window > 0 && first > 0 ? static_cast<int>(first) : 0;
  return end <= begin ? Range{0, 0} : Range{begin, end};
}

// Of one of a sequence's query rows; -1, and an error, if it is none.
__device__ inline int position_of(const PagedAttentionParams& p, const SequencePlan& seq, int row,
                                  ErrorRecord* errors) {
  if (!p.q_positions) return seq.seq_len - seq.num_rows + row;
  const int idx = seq.first_row + row, position = p.q_positions[idx];
  if (seq.seq_len == 0) return -1;
  if (position >= (row > 0 ? p.q_positions[idx - 1] : 0) && position < seq.seq_len) return position;
  record_error(errors, BadEntry::kQPositions, idx, position);
  return -1;
}

// Where a position's K and V are.
struct Slot {
  int64_t page;
  int slot;
  bool valid;  // else nothing may be read
};

__device__ inline Slot locate(const Args& args, const SequencePlan& seq, int position, bool needed,
                              bool reports) {
  if (!needed) return {0, 0, false};
  const PagedAttentionParams& p = args.p;
  const int idx = position / p.kv.layout.page_size;
  const int64_t page = p.page_table[seq.first_entry + idx];
  if (page < 0 || page >= p.kv.num_pages) {
    if (reports) record_error(args.errors, BadEntry::kPageTable, seq.first_entry + idx, page);
    return {0, 0, false};
  }
  if (p.generations) {
    const int64_t at = seq.first_expected + idx;
    const uint32_t now = p.generations[page];
    if (now != p.expected_generations[at]) {
      if (reports) {
        record_error(args.errors, BadEntry::kGenerations, at, static_cast<int32_t>(now));
      }
      return {0, 0, false};
    }
  }
  return {page, position - idx * p.kv.layout.page_size, true};
}

// The sequence that an item belongs to, or whatever else a member of the plans counts.
__device__ inline int find_sequence(const Args& args, int idx,
                                    int32_t SequencePlan::* first = &SequencePlan::first_item) {
  int low = 0, high = args.num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (args.plans[middle].*first <= idx) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A row that has seen nothing: no difference of infinities.
__device__ inline float finite(float max) { return max == -INFINITY ? 0.0f : max; }

// One more split of a row; the same operations in the same order wherever splits are put together.
struct Fold {
  float before, part;  // factors of what was there, and of what comes
};

__device__ inline Fold fold(State& all, const State& part) {
  if (part.sum == 0.0f) return {1.0f, 0.0f};
  if (all.sum == 0.0f) {
    all = part;
    return {0.0f, 1.0f};
  }
  const float max = fmaxf(all.max, part.max);
  const Fold by{exp2_fast(all.max - finite(max)), exp2_fast(part.max - finite(max))};
  all = {max, __fmaf_rn(part.sum, by.part, __fmul_rn(all.sum, by.before))};
  return by;
}

// NOTE: out of what has seen nothing is 0.
__device__ inline float fold(float all, float part, const Fold& by) {
  return __fmaf_rn(part, by.part, __fmul_rn(all, by.before));
}

// --- results
// --------------------------------------------------------------------------------------

struct Denominator {
  float factor;  // of the row's out
  float lse;     // natural
};

__device__ inline Denominator denominator(const PagedAttentionParams& p, int head, State state) {
  if (state.sum == 0.0f) return {0.0f, -INFINITY};
  const float sink = p.sinks ? p.sinks[head] * kLog2E : -INFINITY;
  const float max = fmaxf(state.max, sink);
  const float shrink = exp2_fast(state.max - max);
  const float sum = state.sum * shrink + exp2_fast(sink - max);
  return {shrink / sum, max * kLn2 + logf(sum)};
}

__device__ inline void store_out(const PagedAttentionParams& p, int64_t token, int head, int dim,
                                 float value) {
  const int64_t at = token * p.out_stride_token + head * p.out_stride_head + dim;
  if (p.q_dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[at] = value;
  } else if (p.q_dtype == DType::kBFloat16) {
    static_cast<uint16_t*>(p.out)[at] =
        static_cast<uint16_t>(pack_halves<DType::kBFloat16>(value, 0.0f));
  } else {
    static_cast<uint16_t*>(p.out)[at] =
        static_cast<uint16_t>(pack_halves<DType::kFloat16>(value, 0.0f));
  }
}

// Two neighbours, of which the first is even.
__device__ inline void store_pair(const PagedAttentionParams& p, int64_t token, int head, int dim,
                                  float a, float b) {
  const int64_t at = token * p.out_stride_token + head * p.out_stride_head + dim;
  if (p.q_dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[at] = a;
    static_cast<float*>(p.out)[at + 1] = b;
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at) =
        p.q_dtype == DType::kBFloat16 ? pack_halves<DType::kBFloat16>(a, b)
                                      : pack_halves<DType::kFloat16>(a, b);
  }
}

}  // namespace kvlink::cuda
