// What all tiles of paged_attention have in common: rows, what each sees, and its running softmax.
#pragma once

#include "kvlink/cuda/attention_args.cuh"

namespace kvlink::cuda {

// What one row of a tile sees: positions [begin, end).
struct alignas(16) RowFacts {
  int begin, end, position;
  float slope;  // of ALiBi
};

// A tile's rows are (new token, query head of one KV head) pairs. A lane has rows lane / 4 + 8 i of
// its warp's, i < kLaneRows, and of each two columns of kColumns matrices of 16 x 8.
template <int kLaneRows, int kColumns>
struct TileRows {
  const Args& args;
  const PagedAttentionParams& p;
  SequencePlan seq;
  int kv_head, group, first_row;  // first_row: of the sequence's rows times heads
  int base;                       // the warp's first row in the tile
  Range range;                    // positions that any row sees

  RowFacts* facts;  // of all of the tile's rows, in shared memory
  // In powers of two; sums are of this lane's columns alone.
  float max[kLaneRows], sum[kLaneRows];
  float out[kLaneRows / 2][kColumns][4];

  __device__ TileRows(const Args& arguments, const SequencePlan& plan, int head, int row,
                      int warp_base, RowFacts* row_facts)
      : args(arguments),
        p(arguments.p),
        seq(plan),
        kv_head(head),
        group(arguments.p.num_q_heads / arguments.p.kv.layout.num_kv_heads),
        first_row(row),
        base(warp_base),
        facts(row_facts) {}

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int tile_row(int i) const { return base + lane() / 4 + 8 * i; }
  __device__ int num_rows() const { return seq.num_rows * group; }
  __device__ State state(int i) const { return {max[i], sum[i]}; }
  __device__ void set_state(int i, State state) { max[i] = state.max, sum[i] = state.sum; }
  __device__ float (&quad(int m, int column))[4] { return out[m][column]; }
  __device__ int token_of(int row) const { return row / group; }
  __device__ int head_of(int row) const { return kv_head * group + row % group; }

  // Every position that the tile's `rows` rows see, cut to [begin, end).
  __device__ void place(int rows, int begin, int end) {
    const auto position = [&](int row) { return position_of(p, seq, token_of(row), args.errors); };
    const int last_row = first_row + rows < num_rows() ? first_row + rows : num_rows();
    range.begin = visible(p, position(first_row), seq.seq_len).begin;
    range.end = visible(p, position(last_row - 1), seq.seq_len).end;
    if (range.begin < begin) range.begin = begin;
    if (range.end > end) range.end = end;
    if (range.end < range.begin) range.end = range.begin;
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += static_cast<int>(blockDim.x)) {
      const int row = first_row + i;
      const bool real = row < num_rows();  // others see all: it costs nothing and matters to none
      const int at = real ? position(row) : 0;
      const Range sees = real ? visible(p, at, seq.seq_len) : range;
      facts[i] = {sees.begin > range.begin ? sees.begin : range.begin,
                  sees.end < range.end ? sees.end : range.end, at,
                  real && p.alibi_slopes ? p.alibi_slopes[head_of(row)] : 0.0f};
    }
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLaneRows / 2; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) out[i][j][k] = 0.0f;
      }
    }
  }

  __device__ bool mask_shows(int i, int position) const {
    const int64_t bit = static_cast<int64_t>(position) - seq.mask_start;
    const int row = first_row + tile_row(i);
    if (bit < 0 || row >= num_rows()) return true;
    const int64_t token = seq.first_row + token_of(row);
    return bit < 8 * p.mask_bytes &&
           (p.mask[token * p.mask_stride + bit / 8] >> (bit % 8) & 1) != 0;
  }

  __device__ bool sees(int i, const RowFacts& row, int position) const {
    return position >= row.begin && position < row.end && (!p.mask || mask_shows(i, position));
  }

  // Some row of the warp does not see all of what was loaded of [begin, end). The same for all
  // lanes.
  __device__ bool hides(int begin, int end) const {
    if (begin < range.begin) begin = range.begin;
    if (end > range.end) end = range.end;
    bool some = p.mask && end > seq.mask_start;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const RowFacts& row = facts[tile_row(i)];
      some |= row.begin > begin || row.end < end;
    }
    return __any_sync(0xffffffffu, some);
  }

  // Of a product of q and k, in powers of two; -inf where the row does not see the position.
  __device__ float score(int i, const RowFacts& row, int position, float product) const {
    float value = product * p.scale;
    if (p.softcap > 0.0f) value = p.softcap * tanhf(value / p.softcap);
    value += row.slope * static_cast<float>(position - row.position);
    return sees(i, row, position) ? value * kLog2E : -INFINITY;
  }

  __device__ void raise_max(const float (&new_max)[kLaneRows]) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const float shrink = exp2_fast(max[i] - finite(new_max[i]));
      max[i] = new_max[i];
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        out[i / 2][j][i % 2 * 2] *= shrink;
        out[i / 2][j][i % 2 * 2 + 1] *= shrink;
      }
    }
  }

  // Products of weights with values that are not finite, which the matrix product left out: only
  // rows that see such a position get them. `weight(i, token)` must be called by whole warps.
  template <typename Stored, typename Weight>
  __device__ void add_special(const char* values, int first_token, int num_tokens, int position,
                              int first_dim, const Weight& weight) {
#pragma unroll 1
    for (int token = 0; token < num_tokens; ++token) {
      const auto* row = Stored::row(values, first_token + token, first_dim);
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        const float by = weight(i, token);
        if (!sees(i, facts[tile_row(i)], position + token)) continue;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            // NOTE: volatile keeps loads apart, which would take registers from all of the kernel.
            const float value = Stored::Element::load(row[Stored::dim_of(j, half)]);
            const bool special = (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
            if (special) out[i / 2][j][i % 2 * 2 + half] += by * value;
          }
        }
      }
    }
  }
};

// All of the tile's range, block by block, of which kStages - 1 are on their way; `at_split` is
// called wherever a split begins, but for the first. Ends with nothing under way and shared memory
// free for other use.
template <typename Tile, typename AtSplit>
__device__ void attend(Tile& tile, const AtSplit& at_split) {
  constexpr int kStages = Tile::kStages, kBlockTokens = Tile::kBlockTokens;
  constexpr int kSplitBlocks = Tile::kSplitTokens / kBlockTokens;
  tile.load_queries();
  const Range range = tile.range;
  const int first = range.begin / kBlockTokens;
  const int end = range.end > range.begin ? (range.end + kBlockTokens - 1) / kBlockTokens : first;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i < end) tile.load_block(first + i, i);
    commit_copies();
  }
  int stage = 0;
  for (int block = first; block < end; ++block) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the block is there for all, and all are done with the one before it
    const int next = block + kStages - 1;
    if (next < end) tile.load_block(next, stage == 0 ? kStages - 1 : stage - 1);
    commit_copies();
    if (block > first && block % kSplitBlocks == 0) at_split();
    tile.attend_block(block, stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
  tile.finish_split();
}

}  // namespace kvlink::cuda
