#include "kvlink/cpu/paged_attention_block.hpp"
#include "kvlink/cpu/paged_attention_panels.hpp"
#include "kvlink/cpu/paged_attention_tile.hpp"
#include "kvlink/cpu/simd/math.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

// --- few rows ------------------------------------------------------------------------------------

// Where the rows of a block lie, those of the tile's first KV head.
struct BlockRows {
  PanelRows keys, values;

  void find(const TileContext& c, int64_t block_begin, VisibleRange range) {
    const LayerView& kv = c.p.kv;
    find_rows(c, kv.k, c.layout.k, c.tile.first_kv_head, block_begin, range, keys);
    find_rows(c, kv.v, c.layout.v, c.tile.first_kv_head, block_begin, range, values);
    if (range.begin >= range.end) return;
    // Rows of K that are not seen are replaced by one that is, and not used.
    for (auto& row : keys) row = row == kNothing ? keys[range.begin - block_begin] : row;
  }
};

RowStream stream_of(const TileContext& c, const PanelRows& rows, const Plane& plane, int64_t dims,
                    int64_t step, int64_t block_begin, VisibleRange range) {
  return {.rows = rows,
          .step = step,
          .first = range.begin - block_begin,
          .num_rows = range.begin < range.end ? range.end - block_begin : 0,
          .head_bytes = dims * c.element_bytes,
          .stride_head = plane.stride_head * c.element_bytes,
          .num_heads = c.tile.num_kv_heads};
}

// Few rows: all KV heads of a handful of positions in turn, so that pages are read front to back.
void attend_in_place(const TileContext& c, int64_t block_begin, VisibleRange range,
                     const BlockRows& rows, const RowStream& value_stream,
                     const RowStream& next_keys, ReadAhead& ahead, const AttentionState& state) {
  const Plane &k = c.layout.k, &v = c.layout.v;
  const bool twice = c.p.kv.k == c.p.kv.v;  // V is a part of K
  ahead.announce(twice ? next_keys : value_stream);
  const int64_t begin = range.begin - block_begin, end = range.end - block_begin;
  for (int64_t first = begin / kScoredRows * kScoredRows; first < end; first += kScoredRows) {
    c.scoring.score({.keys = rows.keys + first,
                     .num_bytes = c.layout.head_dim * c.element_bytes,
                     .num_heads = c.tile.num_kv_heads,
                     .stride_head = k.stride_head * c.element_bytes,
                     .q = c.q,
                     .stride_q = c.q_stride,
                     .num_rows = c.head_rows,
                     .step = c.key_step,
                     .scores = c.scores + first,
                     .ahead = &ahead});
  }

  constexpr int64_t kLinesMeanwhile = 8;  // of memory, while a row of scores becomes weights
  for (int64_t head = 0; head < c.tile.num_kv_heads; ++head) {
    const int64_t kv_head = c.tile.first_kv_head + head;
    find_factors(c, kv_head, block_begin, range);
    for_each_run(c, [&](const TokenRun& run) {
      soften_tokens(c, kv_head, block_begin, run.first, run.last, state);
    });
    ahead.fetch_early(kLinesMeanwhile * (c.head_rows + 1));
  }

  if (!twice) ahead.announce(next_keys);
  constexpr int64_t kAtOnce = 16;  // runs of tokens read the same rows of V in turn
  for (int64_t first = 0; first < kBlockTokens; first += kAtOnce) {
    for_each_run(c, [&](const TokenRun& run) {
      const int64_t row = run.first * c.group;
      for_each_stretch(run.seen & range_bits({first, first + kAtOnce}), [&](VisibleRange seen) {
        const bool is_first = (run.seen & range_bits({0, seen.begin})) == 0;
        c.valuing.add({.values = rows.values + first,
                       .num_heads = c.tile.num_kv_heads,
                       .stride_head = v.stride_head * c.element_bytes,
                       .begin = seen.begin - first,
                       .end = seen.end - first,
                       .dims = c.layout.head_dim_v,
                       .weights = c.scores + row * kBlockTokens + first / c.valuing.positions,
                       .num_rows = (run.last - run.first) * c.group,
                       .head_rows = c.head_rows,
                       .step = c.value_step,
                       .row_scale = is_first ? c.row_scale + row : nullptr,
                       .out = state.out + row * c.out_stride,
                       .stride_out = c.out_stride,
                       .ahead = twice ? nullptr : &ahead});
      });
    });
  }
}

void attend_split_in_place(const TileContext& c, int64_t split, const AttentionState& state) {
  BlockRows rows[2];
  ReadAhead ahead;
  const auto keys_of = [&](const BlockRows& rows, int64_t block) {
    return stream_of(c, rows.keys, c.layout.k, c.layout.head_dim, c.key_step, block,
                     seen_in(c, block));
  };
  const int64_t begin = split * kSplitTokens;
  rows[0].find(c, begin, seen_in(c, begin));
  bool begun = false;
  for (int64_t block = begin, i = 0; block < begin + kSplitTokens; block += kBlockTokens, i ^= 1) {
    const BlockRows& now = rows[i];
    BlockRows& then = rows[i ^ 1];
    const VisibleRange range = seen_in(c, block);
    then.find(c, block + kBlockTokens, seen_in(c, block + kBlockTokens));
    if (range.begin >= range.end) continue;
    find_seen(c, block);
    const RowStream values =
        stream_of(c, now.values, c.layout.v, c.layout.head_dim_v, c.value_step, block, range);
    if (!begun) ahead.begin(keys_of(now, block), values);
    begun = true;
    attend_in_place(c, block, range, now, values, keys_of(then, block + kBlockTokens), ahead,
                    state);
  }
}

void attend_split(const TileContext& c, int64_t split, const AttentionState& state) {
  for (int64_t row = 0; row < c.num_rows; ++row) {
    state.max[row] = kNegInf;
    state.sum[row] = 0.0f;
  }
  __builtin_memset(state.out, 0, c.num_rows * c.out_stride * sizeof(float));
  c.in_place ? attend_split_in_place(c, split, state) : attend_split_in_panels(c, split, state);
}

void load_queries(const TileContext& c) {
  const PagedAttentionParams& p = c.p;
  const int dtype = static_cast<int>(p.q_dtype);
  const auto load = c.scoring.item_dims == 2 ? copy_row : kQueryTypes[dtype].load_row;
  const auto store_parts = c.in_place ? c.scoring.store_query_parts : nullptr;
  const int64_t size = dtype_bytes(p.q_dtype);
  __builtin_memset(c.q, 0, c.num_rows * c.q_stride * sizeof(float));
  float* target = c.q;
  for (int64_t kv_head = 0; kv_head < c.tile.num_kv_heads; ++kv_head) {
    for (int64_t row = 0; row < c.head_rows; ++row) {
      const int64_t token = c.tile.tokens[row / c.group].row;
      const int64_t head = (c.tile.first_kv_head + kv_head) * c.group + row % c.group;
      const char* source = static_cast<const char*>(p.q) +
                           (token * p.q_stride_token + head * p.q_stride_head) * size;
      if (store_parts) {
        store_parts(source, c.layout.head_dim * size, row, c.head_rows, c.q_stride, target);
      } else {
        load(source, c.layout.head_dim, target + row * c.q_stride);
      }
    }
    target += c.head_rows * c.q_stride;
  }
}

}  // namespace

void attend_splits(const AttentionTile& tile, int64_t first_split, int64_t last_split,
                   bool continues, float* scratch, const AttentionState& state,
                   const AttentionState& other) {
  const TileContext context(tile, scratch);
  if (!context.in_place && first_split < last_split) fetch_first_panels(context, first_split);
  load_queries(context);
  for (int64_t split = first_split; split < last_split; ++split) {
    const bool from_scratch = split == first_split && !continues;
    attend_split(context, split, from_scratch ? state : other);
    if (!from_scratch) fold_states(state, other, context.num_rows, context.out_stride);
  }
}

// NOTE: not inlined, so that every caller's compiled arithmetic is the same.
__attribute__((noinline)) void fold_states(const AttentionState& into, const AttentionState& from,
                                           int64_t num_rows, int64_t out_stride) {
  for (int64_t row = 0; row < num_rows; ++row) {
    if (from.max[row] == kNegInf) continue;
    const float new_max = into.max[row] > from.max[row] ? into.max[row] : from.max[row];
    const float keep = exp(splat(into.max[row] - new_max))[0];
    const float add = exp(splat(from.max[row] - new_max))[0];
    into.max[row] = new_max;
    into.sum[row] = into.sum[row] * keep + from.sum[row] * add;
    float* target = into.out + row * out_stride;
    const float* source = from.out + row * out_stride;
    for (int64_t dim = 0; dim < out_stride; dim += kLanes) {
      store(target + dim, load(target + dim) * keep + load(source + dim) * add);
    }
  }
}

void finish_tile(const AttentionTile& tile, const AttentionState& state) {
  const PagedAttentionParams& p = *tile.params;
  const int64_t head_dim_v = p.kv.layout.head_dim_v;
  const int64_t group = p.num_q_heads / p.kv.layout.num_kv_heads;
  const auto store_row = kQueryTypes[static_cast<int>(p.q_dtype)].store_row;
  const int64_t head_rows = tile.num_tokens * group;
  for (int64_t row = 0; row < head_rows * tile.num_kv_heads; ++row) {
    const int64_t token = tile.tokens[row % head_rows / group].row;
    const int64_t head = (tile.first_kv_head + row / head_rows) * group + row % group;
    float max = state.max[row], sum = state.sum[row];
    float factor = 0.0f, lse = kNegInf;
    if (max != kNegInf) {
      if (p.sinks) {
        const float new_max = max > p.sinks[head] ? max : p.sinks[head];
        factor = exp(splat(max - new_max))[0];
        sum = sum * factor + exp(splat(p.sinks[head] - new_max))[0];
        max = new_max;
      } else {
        factor = 1.0f;
      }
      factor /= sum;
      lse = max + __builtin_logf(sum);
    }
    const int64_t offset = token * p.out_stride_token + head * p.out_stride_head;
    store_row(state.out + row * padded_row(head_dim_v), factor, head_dim_v,
              static_cast<char*>(p.out) + offset * dtype_bytes(p.q_dtype));
    if (p.lse) p.lse[token * p.num_q_heads + head] = lse;
  }
}

}  // namespace kvlink::cpu::KVLINK_SIMD_LEVEL
