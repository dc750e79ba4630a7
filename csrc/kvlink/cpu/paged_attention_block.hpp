// A tile of query rows at a block of positions: where the rows of K and V lie, which of them each
// token sees, and scores made weights. Included by paged_attention_simd.cpp only.
#pragma once

#include "kvlink/base/math.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"
#include "kvlink/cpu/paged_attention_types.hpp"
#include "kvlink/cpu/simd/soften_rows.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

constexpr float kNegInf = -__builtin_inff();
constexpr int64_t kBlockVecs = kBlockTokens / kLanes;

static_assert(kPanelRows == kBlockTokens && sizeof(kNothing) >= kMaxHeadDim * 4);

// --- a tile ------------------------------------------------------------------------------------

// Everything about a tile that stays the same from block to block.
struct TileContext {
  const AttentionTile& tile;
  const PagedAttentionParams& p;
  const KVLayout& layout;
  const ScoreType& scoring;
  const ValueType& valuing;
  Weights weights;
  int64_t element_bytes;
  int32_t group;      // query heads per KV head
  int64_t head_rows;  // of one KV head: tokens * group
  int64_t num_rows;
  int64_t num_items, q_stride;  // of a query row
  int64_t out_stride;
  bool in_place;
  int64_t key_step, value_step;  // positions that all KV heads take their turn at, in place
  float* q;                      // [num_rows, num_items], rows q_stride apart, zeros between
  float* keys;                   // [num_items and zeros, kBlockTokens]
  float* values;                 // [kBlockTokens / positions, out_stride]
  float* edge;                   // [out_stride] one of its rows, of which one position is left
  float* scores;                 // [num_rows, kBlockTokens]; becomes the weights
  float* row_scale;              // [num_rows] factor of what a row has gathered so far
  float* distances;              // [num_tokens] from a token to a block, with ALiBi
  uint64_t* seen;                // [num_tokens] bit i: the token sees position i of the block
  float* key_factors;            // [kBlockTokens] scale of the scores, times that of K
  float* value_factors;          // [kBlockTokens] scale of V
  char* gathered;                // [kBlockTokens] rows of K or V as stored

  TileContext(const AttentionTile& tile, float* scratch)
      : tile(tile),
        p(*tile.params),
        layout(tile.params->kv.layout),
        scoring(score_type(p)),
        valuing(value_type(p)),
        weights(weights_of(p)),
        element_bytes(dtype_bytes(layout.dtype)),
        group(p.num_q_heads / layout.num_kv_heads),
        head_rows(int64_t{tile.num_tokens} * group),
        num_rows(head_rows * tile.num_kv_heads),
        num_items(layout.head_dim / scoring.item_dims),
        q_stride(padded_query(layout.head_dim) / scoring.item_dims),
        out_stride(padded_row(layout.head_dim_v)),
        in_place(attends_in_place(layout, head_rows)),
        key_step(RowStream::step_of(row_bytes(layout.head_dim))),
        value_step(RowStream::step_of(row_bytes(layout.head_dim_v))) {
    const auto take = [&scratch](int64_t num_floats) {
      float* taken = scratch;
      scratch += num_floats;
      return taken;
    };
    keys = take(kBlockTokens * padded_row(layout.head_dim));
    values = take(kBlockTokens * out_stride);
    edge = take(out_stride);
    scores = take(num_rows * kBlockTokens);
    key_factors = take(kBlockTokens);
    value_factors = take(kBlockTokens);
    seen = reinterpret_cast<uint64_t*>(take(2 * round_up(tile.num_tokens, 8)));
    q = take(num_rows * padded_query(layout.head_dim));
    row_scale = take(num_rows);
    distances = take(tile.num_tokens);
    gathered = reinterpret_cast<char*>(scratch);
  }

  int64_t row_bytes(int64_t dims) const { return tile.num_kv_heads * dims * element_bytes; }
  VisibleRange token_range(int64_t token) const { return tile.tokens[token].range; }
};

// Calls each(position, element of the plane) for the positions of `range`.
template <class Each>
KVLINK_INLINE void for_each_slot(const TileContext& c, const Plane& plane, int64_t kv_head,
                                 VisibleRange range, const Each& each) {
  if (range.begin >= range.end) return;
  const int64_t page_size = c.layout.page_size;
  int64_t page_idx = range.begin / page_size;
  int64_t slot = range.begin % page_size;
  for (int64_t position = range.begin; position < range.end; ++page_idx, slot = 0) {
    int64_t element = plane.element(c.tile.pages[page_idx], slot, kv_head, 0);
    for (; slot < page_size && position < range.end; ++slot, ++position) {
      each(position, element);
      element += plane.stride_slot;
    }
  }
}

// Fills rows[position - block_begin] for the positions of `range`, others with kNothing.
void find_rows(const TileContext& c, const void* base, const Plane& plane, int64_t kv_head,
               int64_t block_begin, VisibleRange range, PanelRows& rows) {
  for (auto& row : rows) row = kNothing;
  for_each_slot(c, plane, kv_head, range, [&](int64_t position, int64_t element) {
    rows[position - block_begin] = static_cast<const char*>(base) + element * c.element_bytes;
  });
}

// Per-position factors: `uniform` times the position's scale, where there are scales.
void find_factors(const TileContext& c, const float* scales, const Plane& plane, int64_t kv_head,
                  float uniform, int64_t block_begin, VisibleRange range, float* factors) {
  const bool varies = scales && (plane.stride_page != 0 || plane.stride_slot != 0);
  if (scales && !varies) uniform *= scales[plane.element(0, 0, kv_head, 0)];
  for (int64_t i = 0; i < kBlockTokens; ++i) factors[i] = uniform;
  if (!varies) return;
  for_each_slot(c, plane, kv_head, range, [&](int64_t position, int64_t element) {
    factors[position - block_begin] *= scales[element];
  });
}

void find_factors(const TileContext& c, int64_t kv_head, int64_t block_begin, VisibleRange range) {
  const LayerView& kv = c.p.kv;
  find_factors(c, kv.k_scale, c.layout.k_scale, kv_head, c.p.scale, block_begin, range,
               c.key_factors);
  find_factors(c, kv.v_scale, c.layout.v_scale, kv_head, 1.0f, block_begin, range, c.value_factors);
}

// --- one block -----------------------------------------------------------------------------------

VisibleRange intersect(VisibleRange a, int64_t begin, int64_t end) {
  return {a.begin > begin ? a.begin : begin, a.end < end ? a.end : end};
}

// Positions of the block that any of the tile's tokens sees, masks left out.
VisibleRange seen_in(const TileContext& c, int64_t block_begin) {
  const VisibleRange tile{c.token_range(0).begin, c.token_range(c.tile.num_tokens - 1).end};
  return intersect(tile, block_begin, block_begin + kBlockTokens);
}

// Tokens [first, last) that see the same positions of a block; bit i: its position i.
struct TokenRun {
  int64_t first, last;
  uint64_t seen;
};

uint64_t range_bits(VisibleRange range) {  // of a block's positions
  if (range.begin >= range.end) return 0;
  return ~uint64_t{0} >> (64 - (range.end - range.begin)) << range.begin;
}

void find_seen(const TileContext& c, int64_t block_begin) {
  const int64_t block_end = block_begin + kBlockTokens, num_tokens = c.tile.num_tokens;
  const bool all = !c.p.mask && c.token_range(0).end >= block_end &&
                   c.token_range(num_tokens - 1).begin <= block_begin;
  for (int64_t token = 0; token < num_tokens; ++token) {
    c.seen[token] = ~uint64_t{0};
    if (all) continue;
    const VisibleRange range = intersect(c.token_range(token), block_begin, block_end);
    c.seen[token] = range_bits({range.begin - block_begin, range.end - block_begin}) &
                    mask_bits(c.tile.tokens[token], c.p.mask_bytes, block_begin);
  }
}

// Calls each(run) for the tokens that see any of the block. Values are added over runs, and over
// those alone: what a row does not see is never multiplied, not even by 0.
template <class Each>
KVLINK_INLINE void for_each_run(const TileContext& c, const Each& each) {
  for (int64_t token = 0; token < c.tile.num_tokens;) {
    TokenRun run{token, token + 1, c.seen[token]};
    while (run.last < c.tile.num_tokens && c.seen[run.last] == run.seen) ++run.last;
    token = run.last;
    if (run.seen) each(run);
  }
}

// Calls each(range) for the stretches of positions that are in `bits`.
template <class Each>
KVLINK_INLINE void for_each_stretch(uint64_t bits, const Each& each) {
  while (bits) {
    const int64_t begin = __builtin_ctzll(bits);
    const uint64_t from_begin = ~(bits >> begin);
    const int64_t length = from_begin ? __builtin_ctzll(from_begin) : 64;
    each(VisibleRange{begin, begin + length});
    bits &= ~range_bits({begin, begin + length});
  }
}

// Turns the scores of the tokens' rows into weights, times the values' scales.
void soften_tokens(const TileContext& c, int64_t kv_head, int64_t block_begin, int64_t first,
                   int64_t last, const AttentionState& state) {
  const int64_t tokens = last - first;
  const int64_t row = (kv_head - c.tile.first_kv_head) * c.head_rows + first * c.group;
  const float* slopes = c.p.alibi_slopes;
  if (slopes) {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t position = c.tile.tokens[first + i].position;
      c.distances[i] = static_cast<float>(block_begin - position);
    }
  }
  soften_rows({.scores = c.scores + row * kBlockTokens,
               .num_rows = tokens * c.group,
               .key_factors = c.key_factors,
               .value_factors = c.p.kv.v_scale ? c.value_factors : nullptr,
               .seen = c.seen + first,
               .softcap = c.p.softcap,
               .slopes = slopes ? slopes + kv_head * c.group : nullptr,
               .group = c.group,
               .distances = c.distances,
               .weights = c.weights,
               .max = state.max + row,
               .sum = state.sum + row,
               .row_scale = c.row_scale + row});
}

}  // namespace

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
