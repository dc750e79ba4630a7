// What the host code of paged_attention asks of the vector code: attend one tile of query rows to a
// run of splits, fold the states of two runs, and write a finished state out.
//
// Positions are cut into splits of kSplitTokens and blocks of kBlockTokens, both counted from
// position 0. Each split is attended from scratch and splits are folded in rising order, in one
// task or in many: the bits of a result depend on nothing else.
#pragma once

#include <cstdint>

#include "kvlink/base/simd_level.hpp"
#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cpu {

inline constexpr int64_t kSplitTokens = 512;
inline constexpr int64_t kBlockTokens = 64;
inline constexpr int64_t kMaxHeadDim = 1024;
inline constexpr int64_t kRowAlignment = 16;  // floats, of rows of V and of the output in scratch

struct VisibleRange {
  int64_t begin, end;  // positions
};

// All query heads of a new token.
struct TokenRow {
  int64_t row;          // of q and out
  int64_t position;     // in its sequence
  VisibleRange range;   // positions it sees, the mask left out
  const uint8_t* mask;  // bits from position mask_begin on; null: none
  int64_t mask_begin = 0;
};

// Query rows that attend the same pages: num_tokens tokens, of each the query heads of num_kv_heads
// KV heads. The rows of a KV head follow each other: token by token, and of each token its
// num_q_heads / num_kv_heads query heads. Ranges of later tokens neither begin nor end earlier.
struct AttentionTile {
  const PagedAttentionParams* params;
  const int32_t* pages;    // by position / page_size
  const TokenRow* tokens;  // [num_tokens]
  int32_t num_tokens;
  int32_t first_kv_head;
  int32_t num_kv_heads;
};

// Running softmax of a tile's rows: the largest score, the sum of exp(score - max), and the
// values weighted the same way. A row that has seen nothing has max = -inf.
struct AttentionState {
  float* max;  // [num_rows]
  float* sum;  // [num_rows]
  float* out;  // [num_rows, out_stride]
};

// Positions that a query at `position` sees.
inline VisibleRange visible_range(const PagedAttentionParams& p, int64_t position,
                                  int64_t seq_len) {
  const int64_t end = p.causal && position + 1 < seq_len ? position + 1 : seq_len;
  const int64_t begin = p.window > 0 && position - p.window + 1 > 0 ? position - p.window + 1 : 0;
  if (end <= begin) return {0, 0};
  return {begin, end};
}

// Bit i: the token's mask lets it see position block_begin + i.
inline uint64_t mask_bits(const TokenRow& token, int64_t num_bytes, int64_t block_begin) {
  constexpr uint64_t kAll = ~uint64_t{0};
  if (!token.mask) return kAll;
  const int64_t first = block_begin - token.mask_begin;
  if (first <= -64) return kAll;
  const int64_t bit = first < 0 ? 0 : first;
  uint64_t bits = 0;
  for (int64_t i = 0; i < 9 && bit / 8 + i < num_bytes; ++i) {
    const uint64_t byte = token.mask[bit / 8 + i];
    const int64_t shift = 8 * i - bit % 8;
    bits |= shift < 0 ? byte >> -shift : shift < 64 ? byte << shift : 0;
  }
  return first < 0 ? bits << -first | kAll >> (64 + first) : bits;
}

inline int64_t padded_row(int64_t dims) {
  return (dims + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// Few rows a KV head read K and V where they lie; for more it pays to widen a block once. Both
// compute every result in the same order, so that it is the same bit for bit.
inline constexpr int64_t kMaxRowsInPlace = 16;
inline bool attends_in_place(const KVLayout& layout, int64_t rows_per_head) {
  return rows_per_head <= kMaxRowsInPlace && layout.k.stride_dim == 1 && layout.v.stride_dim == 1;
}

inline int64_t padded_query(int64_t dims) { return (dims + 63) / 64 * 64; }

// Floats of scratch memory that attend_splits needs for a tile of num_rows rows.
inline int64_t attention_scratch_floats(const KVLayout& layout, int64_t num_rows) {
  const int64_t v_row = padded_row(layout.head_dim_v);
  const int64_t block_rows = padded_row(layout.head_dim) + v_row + 2;  // K, V and their factors
  const bool gathers = layout.k.stride_dim != 1 || layout.v.stride_dim != 1;
  const int64_t gathered = gathers ? (layout.head_dim > v_row ? layout.head_dim : v_row) : 0;
  const int64_t row_floats = padded_query(layout.head_dim) + kBlockTokens + 4;
  return kBlockTokens * (block_rows + gathered) + v_row + num_rows * row_floats + 16;
}

KVLINK_SIMD_DECLARE(
    // Attends the tile to splits [first_split, last_split), folded into one state, or, if it
    // continues, folded into what the state holds of the splits before. `other` is a second state
    // for the fold; unused for a single split from scratch.
    void attend_splits(const AttentionTile& tile, int64_t first_split, int64_t last_split,
                       bool continues, float* scratch, const AttentionState& state,
                       const AttentionState& other);
    // into += from, where every position of `from` comes after those of `into`.
    void fold_states(const AttentionState& into, const AttentionState& from, int64_t num_rows,
                     int64_t out_stride);
    // Adds the sinks, divides, and writes out and lse of the tile's rows.
    void finish_tile(const AttentionTile& tile, const AttentionState& state);)

}  // namespace kvlink::cpu
