#include "kvlink/cpu/paged_attention_tile.hpp"
#include "kvlink/cpu/simd/math.hpp"
#include "kvlink/cpu/simd/rows.hpp"
#include "kvlink/cpu/simd/tile_product.hpp"

namespace kvlink::cpu::KVLINK_SIMD_LEVEL {

namespace {

constexpr float kNegInf = -__builtin_inff();
constexpr int64_t kBlockVecs = kBlockTokens / kLanes;

// --- rows in and out -------------------------------------------------------------------------

// Rows of one block of positions; kNothing where the position is not read.
using BlockRows = const char* [kBlockTokens];
alignas(64) constexpr char kNothing[kMaxHeadDim * 4] = {};

// Asks for a row that the next block will want, so that memory works while this block is widened.
KVLINK_INLINE void prefetch_row(const char* row, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// K transposed: keys[dim * kBlockTokens + position].
template <DType kDType>
void pack_keys(const BlockRows& rows, const BlockRows& next, int64_t dims, float* keys) {
  constexpr int64_t kBytes = Row<kDType>::kBytes;
  for (int64_t first = 0; first < kBlockTokens; first += kLanes) {
    const char* const* source = rows + first;
    Vec block[kLanes];
    int64_t dim = 0, ahead = 0;
    for (; dim + kLanes <= dims; dim += kLanes) {
      for (; ahead * dims < (dim + kLanes) * kLanes; ++ahead) {
        prefetch_row(next[first + ahead], dims * kBytes);
      }
      KVLINK_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = Row<kDType>::load(source[i] + dim * kBytes);
      transpose(block);
      float* target = keys + dim * kBlockTokens + first;
      KVLINK_UNROLL
      for (int i = 0; i < kLanes; ++i) store(target + i * kBlockTokens, block[i]);
    }
    if (dim == dims) continue;
    KVLINK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      block[i] = load_some<kDType>(source[i] + dim * kBytes, dims - dim);
    }
    transpose(block);
    KVLINK_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (dim + i < dims) store(keys + (dim + i) * kBlockTokens + first, block[i]);
    }
  }
}

// values[position * stride + dim], zeros from dims to stride.
template <DType kDType>
void pack_values(const BlockRows& rows, const BlockRows& next, int64_t dims, int64_t stride,
                 float* values) {
  for (int64_t position = 0; position < kBlockTokens; ++position, values += stride) {
    const char* row = rows[position];
    prefetch_row(next[position], dims * Row<kDType>::kBytes);
    int64_t dim = 0;
    for (; dim + kLanes <= dims; dim += kLanes) {
      store(values + dim, Row<kDType>::load(row + dim * Row<kDType>::kBytes));
    }
    for (; dim < stride; dim += kLanes) {
      const int64_t count = dim < dims ? dims - dim : 0;
      store(values + dim, load_some<kDType>(row + dim * Row<kDType>::kBytes, count));
    }
  }
}

template <DType kDType>
void load_row(const char* source, int64_t dims, float* target) {
  int64_t dim = 0;
  for (; dim + kLanes <= dims; dim += kLanes) {
    store(target + dim, Row<kDType>::load(source + dim * Row<kDType>::kBytes));
  }
  if (dim == dims) return;
  const Vec rest = load_some<kDType>(source + dim * Row<kDType>::kBytes, dims - dim);
  __builtin_memcpy(target + dim, &rest, (dims - dim) * sizeof(float));
}

template <DType kDType>
void store_row(const float* source, float factor, int64_t dims, char* target) {
  int64_t dim = 0;
  for (; dim + kLanes <= dims; dim += kLanes) {
    Row<kDType>::store(target + dim * Row<kDType>::kBytes, load(source + dim) * factor);
  }
  // NOTE: rows of `source` are padded to whole vectors.
  if (dim < dims) {
    store_some<kDType>(target + dim * Row<kDType>::kBytes, load(source + dim) * factor, dims - dim);
  }
}

// The supported types, by DType. q and out are floats; anything but raw bytes may be stored.
struct StoredType {
  void (*pack_keys)(const BlockRows&, const BlockRows&, int64_t, float*);
  void (*pack_values)(const BlockRows&, const BlockRows&, int64_t, int64_t, float*);
};
constexpr StoredType kStoredTypes[] = {
    {pack_keys<DType::kFloat32>, pack_values<DType::kFloat32>},
    {pack_keys<DType::kFloat16>, pack_values<DType::kFloat16>},
    {pack_keys<DType::kBFloat16>, pack_values<DType::kBFloat16>},
    {pack_keys<DType::kFloat8E4M3>, pack_values<DType::kFloat8E4M3>},
    {pack_keys<DType::kFloat8E5M2>, pack_values<DType::kFloat8E5M2>},
    {pack_keys<DType::kInt8>, pack_values<DType::kInt8>},
};

struct QueryType {
  void (*load_row)(const char*, int64_t, float*);
  void (*store_row)(const float*, float, int64_t, char*);
};
constexpr QueryType kQueryTypes[] = {
    {load_row<DType::kFloat32>, store_row<DType::kFloat32>},
    {load_row<DType::kFloat16>, store_row<DType::kFloat16>},
    {load_row<DType::kBFloat16>, store_row<DType::kBFloat16>},
};

// --- one block -------------------------------------------------------------------------------

// Everything about a tile that stays the same from block to block.
struct TileContext {
  const AttentionTile& tile;
  const PagedAttentionParams& p;
  const KVLayout& layout;
  int32_t group;     // query heads per KV head
  int64_t num_rows;  // tokens * group
  int64_t out_stride;
  float* q;              // [num_rows, head_dim]
  float* keys;           // [head_dim, kBlockTokens]
  float* values;         // [kBlockTokens, out_stride]
  float* scores;         // [num_rows, kBlockTokens]; becomes the weights
  float* row_scale;      // [num_rows] factor of what a row has gathered so far
  float* key_factors;    // [kBlockTokens] scale of the scores, times that of K
  float* value_factors;  // [kBlockTokens] scale of V
  char* gathered;        // [kBlockTokens] rows of K or V as stored

  TileContext(const AttentionTile& tile, float* scratch)
      : tile(tile),
        p(*tile.params),
        layout(tile.params->kv.layout),
        group(p.num_q_heads / layout.num_kv_heads),
        num_rows(int64_t{tile.num_tokens} * group),
        out_stride(padded_row(layout.head_dim_v)) {
    const auto take = [&scratch](int64_t num_floats) {
      float* taken = scratch;
      scratch += num_floats;
      return taken;
    };
    keys = take(kBlockTokens * layout.head_dim);
    values = take(kBlockTokens * out_stride);
    scores = take(num_rows * kBlockTokens);
    key_factors = take(kBlockTokens);
    value_factors = take(kBlockTokens);
    q = take(num_rows * layout.head_dim);
    row_scale = take(num_rows);
    gathered = reinterpret_cast<char*>(scratch);
  }

  VisibleRange token_range(int64_t token) const {
    return visible_range(p, tile.first_position + token, tile.seq_len);
  }
};

// Fills rows[position - block_begin] for the positions of `range`.
void find_rows(const TileContext& c, const char* base, const Plane& plane, int64_t block_begin,
               VisibleRange range, BlockRows& rows) {
  for (auto& row : rows) row = kNothing;
  const int64_t page_size = c.layout.page_size;
  const int64_t element_bytes = dtype_bytes(c.layout.dtype);
  if (range.begin >= range.end) return;
  const char** target = rows + (range.begin - block_begin);
  int64_t page_idx = range.begin / page_size;
  int64_t slot = range.begin % page_size;
  for (int64_t position = range.begin; position < range.end; ++page_idx, slot = 0) {
    const int64_t element = plane.element(c.tile.pages[page_idx], slot, c.tile.kv_head, 0);
    const char* row = base + element * element_bytes;
    for (; slot < page_size && position < range.end; ++slot, ++position) {
      *target++ = row;
      row += plane.stride_slot * element_bytes;
    }
  }
}

// Copies rows whose elements are not contiguous, so that they are.
void gather_rows(const TileContext& c, const Plane& plane, int64_t dims, BlockRows& rows) {
  const int64_t element_bytes = dtype_bytes(c.layout.dtype);
  const int64_t step = plane.stride_dim * element_bytes;
  char* copy = c.gathered;
  for (auto& row : rows) {
    if (row == kNothing) continue;
    for (int64_t dim = 0; dim < dims; ++dim) {
      __builtin_memcpy(copy + dim * element_bytes, row + dim * step, element_bytes);
    }
    row = copy;
    copy += dims * element_bytes;
  }
}

// Per-position factors: `uniform` times the position's scale, where there are scales.
void find_factors(const TileContext& c, const float* scales, const Plane& plane, float uniform,
                  int64_t block_begin, VisibleRange range, float* factors) {
  for (int64_t i = 0; i < kBlockTokens; ++i) factors[i] = uniform;
  if (!scales) return;
  for (int64_t position = range.begin; position < range.end; ++position) {
    const int64_t page = c.tile.pages[position / c.layout.page_size];
    const int64_t slot = position % c.layout.page_size;
    factors[position - block_begin] *= scales[plane.element(page, slot, c.tile.kv_head, 0)];
  }
}

// Loads the positions of `range`, and prefetches those of `next` in the block after it.
void load_block(const TileContext& c, int64_t block_begin, VisibleRange range, VisibleRange next) {
  const LayerView& kv = c.p.kv;
  const StoredType& type = kStoredTypes[static_cast<int>(c.layout.dtype)];
  BlockRows rows, next_rows;
  const auto find = [&](const void* base, const Plane& plane, int64_t dims) {
    find_rows(c, static_cast<const char*>(base), plane, block_begin, range, rows);
    find_rows(c, static_cast<const char*>(base), plane, block_begin + kBlockTokens, next,
              next_rows);
    if (plane.stride_dim != 1) gather_rows(c, plane, dims, rows);
  };
  find(kv.k, c.layout.k, c.layout.head_dim);
  type.pack_keys(rows, next_rows, c.layout.head_dim, c.keys);
  find(kv.v, c.layout.v, c.layout.head_dim_v);
  type.pack_values(rows, next_rows, c.layout.head_dim_v, c.out_stride, c.values);
  find_factors(c, kv.k_scale, c.layout.k_scale, c.p.scale, block_begin, range, c.key_factors);
  find_factors(c, kv.v_scale, c.layout.v_scale, 1.0f, block_begin, range, c.value_factors);
}

// Turns a row of q.k into weights exp(score - max), times the values' scales; the weights of the
// positions outside [begin, end) are 0 whatever K holds there. Updates max and sum, and returns the
// factor that brings what was gathered before under the new max.
float soften_row(const TileContext& c, int64_t row, int64_t block_begin, VisibleRange range,
                 float& row_max, float& row_sum) {
  const int32_t head = c.tile.kv_head * c.group + static_cast<int32_t>(row % c.group);
  const int64_t q_position = c.tile.first_position + row / c.group;
  const VecI first = splat(static_cast<int32_t>(range.begin - block_begin));
  const VecI last = splat(static_cast<int32_t>(range.end - block_begin));
  float* scores = c.scores + row * kBlockTokens;
  Vec score[kBlockVecs];
  Vec largest = splat(kNegInf);
  VecI lane = lane_indices();
  for (int64_t v = 0; v < kBlockVecs; ++v, lane += kLanes) {
    Vec x = load(scores + v * kLanes) * load(c.key_factors + v * kLanes);
    if (c.p.softcap > 0.0f) x = tanh(x / c.p.softcap) * c.p.softcap;
    if (c.p.alibi_slopes) {
      const Vec distance =
          __builtin_convertvector(lane, Vec) + static_cast<float>(block_begin - q_position);
      x += distance * c.p.alibi_slopes[head];
    }
    score[v] = select((lane >= first) & (lane < last), x, splat(kNegInf));
    largest = max(largest, score[v]);
  }
  const float block_max = max_lanes(largest);
  const float new_max = row_max > block_max ? row_max : block_max;
  if (new_max == kNegInf) {  // every visible score is -inf
    for (int64_t v = 0; v < kBlockVecs; ++v) store(scores + v * kLanes, Vec{});
    return 1.0f;
  }
  Vec sum = Vec{};
  for (int64_t v = 0; v < kBlockVecs; ++v) {
    const Vec weight = exp(score[v] - new_max);
    sum += weight;
    store(scores + v * kLanes, weight * load(c.value_factors + v * kLanes));
  }
  const float rescale = row_max == new_max ? 1.0f : exp(splat(row_max - new_max))[0];
  row_max = new_max;
  row_sum = row_sum * rescale + sum_lanes(sum);
  return rescale;
}

VisibleRange intersect(VisibleRange a, int64_t begin, int64_t end) {
  return {a.begin > begin ? a.begin : begin, a.end < end ? a.end : end};
}

// Attends the tile to one block; `range` of it, and `next` of the one after, are seen by some row.
void attend_block(const TileContext& c, int64_t block_begin, VisibleRange range, VisibleRange next,
                  const AttentionState& state) {
  load_block(c, block_begin, range, next);
  const int64_t block_end = block_begin + kBlockTokens;
  int64_t first_token = 0, last_token = c.tile.num_tokens;  // those that see any of the block
  while (c.token_range(first_token).end <= block_begin) ++first_token;
  while (c.token_range(last_token - 1).begin >= block_end) --last_token;
  const int64_t first_row = first_token * c.group, last_row = last_token * c.group;
  tile_product({.a = c.q + first_row * c.layout.head_dim,
                .b = c.keys,
                .c = c.scores + first_row * kBlockTokens,
                .row_scale = nullptr,
                .stride_a = c.layout.head_dim,
                .stride_b = kBlockTokens,
                .stride_c = kBlockTokens,
                .num_rows = last_row - first_row,
                .depth = c.layout.head_dim,
                .num_vecs = kBlockVecs});
  // Values are added over runs of tokens that see the same positions, and over those alone: what a
  // row does not see is never multiplied, not even by 0.
  for (int64_t token = first_token, next; token < last_token; token = next) {
    const VisibleRange seen = intersect(c.token_range(token), block_begin, block_end);
    for (next = token; next < last_token; ++next) {
      const VisibleRange other = intersect(c.token_range(next), block_begin, block_end);
      if (other.begin != seen.begin || other.end != seen.end) break;
      for (int64_t row = next * c.group; row < (next + 1) * c.group; ++row) {
        c.row_scale[row] = soften_row(c, row, block_begin, seen, state.max[row], state.sum[row]);
      }
    }
    const int64_t row = token * c.group, offset = seen.begin - block_begin;
    tile_product({.a = c.scores + row * kBlockTokens + offset,
                  .b = c.values + offset * c.out_stride,
                  .c = state.out + row * c.out_stride,
                  .row_scale = c.row_scale + row,
                  .stride_a = kBlockTokens,
                  .stride_b = c.out_stride,
                  .stride_c = c.out_stride,
                  .num_rows = (next - token) * c.group,
                  .depth = seen.end - seen.begin,
                  .num_vecs = c.out_stride / kLanes});
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
  for (int64_t block = split * kSplitTokens; block < end; block += kBlockTokens) {
    const VisibleRange range = intersect(tile, block, block + kBlockTokens);
    const VisibleRange next = intersect(tile, block + kBlockTokens, block + 2 * kBlockTokens);
    if (range.begin < range.end) attend_block(c, block, range, next, state);
  }
}

void load_queries(const TileContext& c) {
  const PagedAttentionParams& p = c.p;
  const auto load = kQueryTypes[static_cast<int>(p.q_dtype)].load_row;
  const int64_t size = dtype_bytes(p.q_dtype);
  for (int64_t row = 0; row < c.num_rows; ++row) {
    const int64_t token = c.tile.first_row + row / c.group;
    const int64_t head = int64_t{c.tile.kv_head} * c.group + row % c.group;
    const char* source =
        static_cast<const char*>(p.q) + (token * p.q_stride_token + head * p.q_stride_head) * size;
    load(source, c.layout.head_dim, c.q + row * c.layout.head_dim);
  }
}

}  // namespace

void attend_splits(const AttentionTile& tile, int64_t first_split, int64_t last_split,
                   float* scratch, const AttentionState& state, const AttentionState& other) {
  const TileContext context(tile, scratch);
  load_queries(context);
  for (int64_t split = first_split; split < last_split; ++split) {
    attend_split(context, split, split == first_split ? state : other);
    if (split != first_split) fold_states(state, other, context.num_rows, context.out_stride);
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
  for (int64_t row = 0; row < tile.num_tokens * group; ++row) {
    const int64_t token = tile.first_row + row / group;
    const int64_t head = tile.kv_head * group + row % group;
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
