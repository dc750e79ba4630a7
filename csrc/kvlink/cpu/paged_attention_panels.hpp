// Many query rows: a block's rows of K and V are widened into panels, which all of the tile's rows
// are multiplied with. Included by paged_attention_simd.cpp only.
#pragma once

#include "kvlink/base/math.hpp"
#include "kvlink/cpu/paged_attention_block.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// Adds `depth` rows of a panel, with the weights from `first` on.
void add_panel(const TileContext& c, const float* values, int64_t first, int64_t depth, int64_t row,
               int64_t num_rows, const AttentionState& state) {
  c.valuing.product({.a = c.scores + row * kBlockTokens + first,
                     .b = values,
                     .c = state.out + row * c.out_stride,
                     .row_scale = c.row_scale + row,
                     .stride_a = kBlockTokens,
                     .stride_b = c.out_stride,
                     .stride_c = c.out_stride,
                     .num_rows = num_rows,
                     .depth = depth,
                     .num_vecs = c.out_stride / kLanes});
}

// Adds the values of positions that all of the rows see.
void add_stretch(const TileContext& c, VisibleRange seen, int64_t row, int64_t num_rows,
                 const AttentionState& state) {
  const auto add = [&](const float* values, int64_t first, int64_t count) {
    if (count <= 0) return;
    add_panel(c, values, first, count, row, num_rows, state);
    for (int64_t i = 0; i < num_rows; ++i) c.row_scale[row + i] = 1.0f;  // rescaled already
  };
  if (c.valuing.positions == 1) {
    add(c.values + seen.begin * c.out_stride, seen.begin, seen.end - seen.begin);
    return;
  }
#if defined(__AVX512F__)
  // Pairs of which the rows see one position only are added without the other.
  const auto add_one = [&](int64_t position) {
    const float* pair = c.values + position / 2 * c.out_stride;
    keep_one_of_pairs(pair, position % 2 != 0, c.out_stride, c.edge);
    add(c.edge, position / 2, 1);
  };
  const int64_t first = (seen.begin + 1) / 2, last = seen.end / 2;
  if (seen.begin % 2) add_one(seen.begin);
  add(c.values + first * c.out_stride, first, last - first);
  if (seen.end % 2) add_one(seen.end - 1);
#endif
}

// Copies rows whose elements are not contiguous, so that they are.
void gather_rows(const TileContext& c, const Plane& plane, int64_t dims, PanelRows& rows) {
  const int64_t step = plane.stride_dim * c.element_bytes;
  char* copy = c.gathered;
  for (auto& row : rows) {
    if (row == kNothing) continue;
    for (int64_t dim = 0; dim < dims; ++dim) {
      __builtin_memcpy(copy + dim * c.element_bytes, row + dim * step, c.element_bytes);
    }
    row = copy;
    copy += dims * c.element_bytes;
  }
}

// Where the rows of a block lie, those of the tile's only KV head.
struct PanelBlock {
  PanelRows keys, values;

  void find(const TileContext& c, int64_t block_begin) {
    const LayerView& kv = c.p.kv;
    const VisibleRange range = seen_in(c, block_begin);
    find_rows(c, kv.k, c.layout.k, c.tile.first_kv_head, block_begin, range, keys);
    find_rows(c, kv.v, c.layout.v, c.tile.first_kv_head, block_begin, range, values);
  }
};

// Asks for the rows of a block that follows, a few at a time, so that memory works while others are
// multiplied.
class PanelsAhead {
 public:
  PanelsAhead(const TileContext& c, const PanelBlock& block, int64_t num_turns)
      : block_(block),
        key_bytes_(c.layout.head_dim * c.element_bytes),
        value_bytes_(c.p.kv.k == c.p.kv.v ? 0 : c.layout.head_dim_v * c.element_bytes),
        rows_per_turn_(ceil_div(kPanelRows, num_turns)) {}

  void fetch() {
    for (int64_t i = 0; i < rows_per_turn_ && row_ < kPanelRows; ++i, ++row_) {
      prefetch_row(block_.keys[row_], key_bytes_);
      prefetch_row(block_.values[row_], value_bytes_);
    }
  }

 private:
  const PanelBlock& block_;
  int64_t key_bytes_, value_bytes_, rows_per_turn_, row_ = 0;
};

// K and V are widened into panels.
void pack_panels(const TileContext& c, const PanelBlock& block) {
  const auto packed = [&](const PanelRows& rows, const Plane& plane, int64_t dims,
                          const auto& pack) {
    if (plane.stride_dim == 1) return pack(rows);
    PanelRows gathered;
    __builtin_memcpy(gathered, rows, sizeof gathered);
    gather_rows(c, plane, dims, gathered);
    pack(gathered);
  };
  packed(block.keys, c.layout.k, c.layout.head_dim,
         [&](const PanelRows& rows) { c.scoring.pack(rows, c.num_items, c.keys); });
  packed(block.values, c.layout.v, c.layout.head_dim_v, [&](const PanelRows& rows) {
    c.valuing.pack(rows, c.layout.head_dim_v, c.out_stride, c.values);
  });
}

// Rows whose scores stay in the nearest cache, beside K, until they are weights; and rows of the
// output that are computed between two looks at memory. Multiples of what a product takes at once.
constexpr int64_t kScoreRows = 24, kValueRows = 24;

// Calls each(first row, number of rows) for rows of the run that are added to at once.
template <class Each>
KVLINK_INLINE void for_each_chunk(const TileContext& c, const TokenRun& run, const Each& each) {
  const int64_t end = run.last * c.group;
  for (int64_t row = run.first * c.group; row < end; row += kValueRows) {
    each(row, end - row < kValueRows ? end - row : kValueRows);
  }
}

// Every token sees the block's first positions, up to some, and no fewer than the token before.
bool sees_ever_more(const TileContext& c) {
  uint64_t before = 0;
  for (int64_t token = 0; token < c.tile.num_tokens; ++token) {
    const uint64_t seen = c.seen[token];
    if ((seen & (seen + 1)) != 0 || seen < before) return false;
    before = seen;
  }
  return true;
}

// Adds the values of such a block, for the last tokens first: of a pair of which the others see one
// position at most, the other is taken out of the panel.
void add_values_from_last(const TileContext& c, const AttentionState& state, PanelsAhead& ahead) {
  for (int64_t last = c.tile.num_tokens; last > 0;) {
    TokenRun run{last - 1, last, c.seen[last - 1]};
    while (run.first > 0 && c.seen[run.first - 1] == run.seen) --run.first;
    last = run.first;
    const int64_t count = run.seen ? 64 - __builtin_clzll(run.seen) : 0;
    if (count == 0) return;
    const int64_t depth = ceil_div(count, c.valuing.positions);
#if defined(__AVX512F__)
    if (count % c.valuing.positions) {
      float* pair = c.values + (depth - 1) * c.out_stride;
      keep_one_of_pairs(pair, false, c.out_stride, pair);
    }
#endif
    for_each_chunk(c, run, [&](int64_t row, int64_t num_rows) {
      add_panel(c, c.values, 0, depth, row, num_rows, state);
      ahead.fetch();
    });
  }
}

void attend_panels(const TileContext& c, int64_t block_begin, const PanelBlock& block,
                   const PanelBlock& next, const AttentionState& state) {
  int64_t first_token = c.tile.num_tokens, last_token = 0;  // those that see any of the block
  for_each_run(c, [&](const TokenRun& run) {
    first_token = run.first < first_token ? run.first : first_token;
    last_token = run.last;
  });
  if (first_token >= last_token) return;  // masked out altogether
  pack_panels(c, block);
  find_factors(c, c.tile.first_kv_head, block_begin, seen_in(c, block_begin));

  const int64_t step = c.group < kScoreRows ? kScoreRows / c.group : 1;  // tokens
  const int64_t num_rows = (last_token - first_token) * c.group;
  const int64_t num_turns = 2 * ceil_div(num_rows, step * c.group) + ceil_div(num_rows, kValueRows);
  PanelsAhead ahead(c, next, num_turns);
  for (int64_t token = first_token; token < last_token; token += step) {
    const int64_t end = token + step < last_token ? token + step : last_token;
    uint64_t seen = 0;
    for (int64_t i = token; i < end; ++i) seen |= c.seen[i];
    if (!seen) continue;
    c.scoring.product({.a = c.q + token * c.group * c.q_stride,
                       .b = c.keys,
                       .c = c.scores + token * c.group * kBlockTokens,
                       .row_scale = nullptr,
                       .stride_a = c.q_stride,
                       .stride_b = kBlockTokens,
                       .stride_c = kBlockTokens,
                       .num_rows = (end - token) * c.group,
                       .depth = (c.num_items + c.scoring.items_of - 1) & -c.scoring.items_of,
                       .num_vecs = seen >> 32 ? kBlockVecs : kBlockVecs / 2});
    ahead.fetch();
    soften_tokens(c, c.tile.first_kv_head, block_begin, token, end, state);
    ahead.fetch();
  }
  if (sees_ever_more(c)) {
    add_values_from_last(c, state, ahead);
    return;
  }
  for_each_run(c, [&](const TokenRun& run) {
    for_each_chunk(c, run, [&](int64_t row, int64_t num_rows) {
      for_each_stretch(run.seen,
                       [&](VisibleRange seen) { add_stretch(c, seen, row, num_rows, state); });
      ahead.fetch();
    });
  });
}

// Asks for what a split begins with, some while before.
void fetch_first_panels(const TileContext& c, int64_t split) {
  PanelBlock block;
  block.find(c, split * kSplitTokens);
  PanelsAhead(c, block, 1).fetch();
}

void attend_split_in_panels(const TileContext& c, int64_t split, const AttentionState& state) {
  PanelBlock blocks[2];
  const int64_t begin = split * kSplitTokens;
  blocks[0].find(c, begin);
  for (int64_t block = begin, i = 0; block < begin + kSplitTokens; block += kBlockTokens, i ^= 1) {
    blocks[i ^ 1].find(c, block + kBlockTokens);
    const VisibleRange range = seen_in(c, block);
    if (range.begin >= range.end) continue;
    find_seen(c, block);
    attend_panels(c, block, blocks[i], blocks[i ^ 1], state);
  }
}

}  // namespace

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
