#include "kvlink/cpu/paged_attention_tile.hpp"
#include "kvlink/cpu/paged_attention_types.hpp"
#include "kvlink/cpu/simd/math.hpp"
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

// Tokens [first, last) that see the same positions of a block; bit i: its position i.
struct TokenRun {
  int64_t first, last;
  uint64_t seen;
};

uint64_t range_bits(VisibleRange range) {  // of a block's positions
  if (range.begin >= range.end) return 0;
  return ~uint64_t{0} >> (64 - (range.end - range.begin)) << range.begin;
}

uint64_t seen_by(const TileContext& c, int64_t token, int64_t block_begin) {
  const VisibleRange range =
      intersect(c.token_range(token), block_begin, block_begin + kBlockTokens);
  return range_bits({range.begin - block_begin, range.end - block_begin}) &
         mask_bits(c.tile.tokens[token], c.p.mask_bytes, block_begin);
}

// Calls each(run) for the tokens that see any of the block. Values are added over runs, and over
// those alone: what a row does not see is never multiplied, not even by 0.
template <class Each>
KVLINK_INLINE void for_each_run(const TileContext& c, int64_t block_begin, const Each& each) {
  for (int64_t token = 0; token < c.tile.num_tokens;) {
    TokenRun run{token, token + 1, seen_by(c, token, block_begin)};
    while (run.last < c.tile.num_tokens && seen_by(c, run.last, block_begin) == run.seen) {
      ++run.last;
    }
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

// Turns the scores of a run's rows into weights, times the values' scales.
void soften_run(const TileContext& c, int64_t kv_head, int64_t block_begin, const TokenRun& run,
                const AttentionState& state) {
  const int64_t tokens = run.last - run.first;
  const int64_t row = (kv_head - c.tile.first_kv_head) * c.head_rows + run.first * c.group;
  const float* slopes = c.p.alibi_slopes;
  if (slopes) {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t position = c.tile.tokens[run.first + i].position;
      c.distances[i] = static_cast<float>(block_begin - position);
    }
  }
  soften_rows({.scores = c.scores + row * kBlockTokens,
               .num_rows = tokens * c.group,
               .key_factors = c.key_factors,
               .value_factors = c.p.kv.v_scale ? c.value_factors : nullptr,
               .seen = run.seen,
               .softcap = c.p.softcap,
               .slopes = slopes ? slopes + kv_head * c.group : nullptr,
               .group = c.group,
               .distances = c.distances,
               .weights = c.weights,
               .max = state.max + row,
               .sum = state.sum + row,
               .row_scale = c.row_scale + row});
}

// Adds the values of positions that all of the rows see.
void add_stretch(const TileContext& c, VisibleRange seen, int64_t row, int64_t num_rows,
                 const AttentionState& state) {
  const auto add = [&](const float* values, int64_t first, int64_t count) {
    if (count <= 0) return;
    c.valuing.product({.a = c.scores + row * kBlockTokens + first,
                       .b = values,
                       .c = state.out + row * c.out_stride,
                       .row_scale = c.row_scale + row,
                       .stride_a = kBlockTokens,
                       .stride_b = c.out_stride,
                       .stride_c = c.out_stride,
                       .num_rows = num_rows,
                       .depth = count,
                       .num_vecs = c.out_stride / kLanes});
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

// Many rows: K and V of one KV head are widened into panels.
void attend_panels(const TileContext& c, int64_t kv_head, int64_t block_begin, VisibleRange range,
                   VisibleRange next, const AttentionState& state) {
  const LayerView& kv = c.p.kv;
  PanelRows rows, next_rows;
  const auto find = [&](const void* base, const Plane& plane, int64_t dims) {
    find_rows(c, base, plane, kv_head, block_begin, range, rows);
    find_rows(c, base, plane, kv_head, block_begin + kBlockTokens, next, next_rows);
    if (plane.stride_dim != 1) gather_rows(c, plane, dims, rows);
  };
  find(kv.k, c.layout.k, c.layout.head_dim);
  c.scoring.pack(rows, next_rows, c.num_items, c.keys);
  find(kv.v, c.layout.v, c.layout.head_dim_v);
  c.valuing.pack(rows, next_rows, c.layout.head_dim_v, c.out_stride, c.values);
  find_factors(c, kv_head, block_begin, range);

  const int64_t head_row = (kv_head - c.tile.first_kv_head) * c.head_rows;
  int64_t first_token = c.tile.num_tokens, last_token = 0;  // those that see any of the block
  for_each_run(c, block_begin, [&](const TokenRun& run) {
    first_token = run.first < first_token ? run.first : first_token;
    last_token = run.last;
  });
  if (first_token >= last_token) return;  // masked out altogether
  const int64_t first_row = head_row + first_token * c.group;
  c.scoring.product({.a = c.q + first_row * c.q_stride,
                     .b = c.keys,
                     .c = c.scores + first_row * kBlockTokens,
                     .row_scale = nullptr,
                     .stride_a = c.q_stride,
                     .stride_b = kBlockTokens,
                     .stride_c = kBlockTokens,
                     .num_rows = (last_token - first_token) * c.group,
                     .depth = (c.num_items + c.scoring.items_of - 1) & -c.scoring.items_of,
                     .num_vecs = kBlockVecs});
  for_each_run(c, block_begin, [&](const TokenRun& run) {
    soften_run(c, kv_head, block_begin, run, state);
    const int64_t row = head_row + run.first * c.group;
    const int64_t num_rows = (run.last - run.first) * c.group;
    for_each_stretch(run.seen,
                     [&](VisibleRange seen) { add_stretch(c, seen, row, num_rows, state); });
  });
}

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
    for_each_run(c, block_begin,
                 [&](const TokenRun& run) { soften_run(c, kv_head, block_begin, run, state); });
    ahead.fetch_early(kLinesMeanwhile * (c.head_rows + 1));
  }

  if (!twice) ahead.announce(next_keys);
  constexpr int64_t kAtOnce = 16;  // runs of tokens read the same rows of V in turn
  for (int64_t first = 0; first < kBlockTokens; first += kAtOnce) {
    for_each_run(c, block_begin, [&](const TokenRun& run) {
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

void attend_split(const TileContext& c, int64_t split, const AttentionState& state) {
  for (int64_t row = 0; row < c.num_rows; ++row) {
    state.max[row] = kNegInf;
    state.sum[row] = 0.0f;
  }
  __builtin_memset(state.out, 0, c.num_rows * c.out_stride * sizeof(float));
  const VisibleRange tile{c.token_range(0).begin, c.token_range(c.tile.num_tokens - 1).end};
  const int64_t end = (split + 1) * kSplitTokens;
  const auto seen_in = [&](int64_t block) { return intersect(tile, block, block + kBlockTokens); };
  BlockRows rows[2];
  ReadAhead ahead;
  const auto keys_of = [&](const BlockRows& rows, int64_t block) {
    return stream_of(c, rows.keys, c.layout.k, c.layout.head_dim, c.key_step, block,
                     seen_in(block));
  };
  if (c.in_place) rows[0].find(c, split * kSplitTokens, seen_in(split * kSplitTokens));
  bool begun = false;
  for (int64_t block = split * kSplitTokens, i = 0; block < end; block += kBlockTokens, ++i) {
    const VisibleRange range = seen_in(block), next = seen_in(block + kBlockTokens);
    if (c.in_place) rows[(i + 1) % 2].find(c, block + kBlockTokens, next);
    if (range.begin >= range.end) continue;
    if (c.in_place) {
      const BlockRows &now = rows[i % 2], &then = rows[(i + 1) % 2];
      const RowStream values =
          stream_of(c, now.values, c.layout.v, c.layout.head_dim_v, c.value_step, block, range);
      if (!begun) ahead.begin(keys_of(now, block), values);
      begun = true;
      attend_in_place(c, block, range, now, values, keys_of(then, block + kBlockTokens), ahead,
                      state);
      continue;
    }
    for (int64_t head = 0; head < c.tile.num_kv_heads; ++head) {
      attend_panels(c, c.tile.first_kv_head + head, block, range, next, state);
    }
  }
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
