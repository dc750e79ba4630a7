// One tile of query rows against a run of positions, on tensor cores: what the kernels of
// paged_attention share.
//
// Rows are (new token, query head of one KV head) pairs, 16 to a warp. Positions are taken in
// blocks of kBlockTokens, counted from position 0. The scores' block is a product of 16-bit values
// with float32 sums; the weights enter the second product as two 16-bit parts, a rounded value and
// the rest, so that they are exact to 2^-16 and results are as close as those of float32.
#pragma once

#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/ptx.cuh"
#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cuda {

inline constexpr int kTileThreads = 128;
inline constexpr int kTileWarps = kTileThreads / 32;
inline constexpr size_t kMaxSharedBytes = 163 << 10;  // of a block, on sm_80
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.693147180559945309417f;

// A sequence as the device has checked it.
struct SequencePlan {
  int64_t first_entry;  // of the page table
  int32_t first_item;   // work items of the sequences before it
  int32_t seq_len;
  int32_t first_row, num_rows;  // of q
  int32_t first_split;          // decode: the first that is seen
};

// Positions [begin, end).
struct Range {
  int begin, end;
};

__device__ inline Range visible(const PagedAttentionParams& p, int position, int seq_len) {
  const int end = p.causal && position + 1 < seq_len ? position + 1 : seq_len;
  const int64_t first = static_cast<int64_t>(position) - p.window + 1;
  const int begin = p.window > 0 && first > 0 ? static_cast<int>(first) : 0;
  return end <= begin ? Range{0, 0} : Range{begin, end};
}

// kMaxDim: head_dim and head_dim_v are at most this. kRowWarps: warps side by side over the rows;
// the others share them, each with its part of every block.
template <DType kDType, int kMaxDim, int kRowWarps>
struct AttentionTile {
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kPositionWarps = kTileWarps / kRowWarps;
  static constexpr int kBlockTokens = kMaxDim > 128 && kRowWarps > 1 ? 32 : 64;
  static constexpr int kWarpTokens = kBlockTokens / kPositionWarps;
  static constexpr int kStages = kMaxDim <= 128 ? 3 : 2;
  // Of a row in shared memory; 16 bytes more than it holds, so that eight rows lie in different
  // banks.
  static constexpr int kStride = kMaxDim + 8;
  static constexpr int kStageElements = 2 * kBlockTokens * kStride;
  static constexpr size_t kSharedBytes = 2 * (kRows * kStride + kStages * kStageElements);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  const PagedAttentionParams& p;
  SequencePlan seq;
  ErrorRecord* errors;
  int kv_head, group, first_row;  // first_row: of the sequence's rows times heads
  Range range;                    // positions that any row sees

  // Of this lane's rows, g and g + 8.
  int row_begin[2], row_end[2], row_position[2];
  float slope[2];
  // Running softmax, in powers of two; sums are of this lane's columns alone.
  float max[2], sum[2];
  float out[kMaxDim / 8][4];

  __device__ AttentionTile(const PagedAttentionParams& params, const SequencePlan& plan,
                           ErrorRecord* record, int head, int row)
      : p(params),
        seq(plan),
        errors(record),
        kv_head(head),
        group(params.num_q_heads / params.kv.layout.num_kv_heads),
        first_row(row) {}

  __device__ static uint16_t* queries() { return reinterpret_cast<uint16_t*>(shared_memory()); }
  __device__ static uint16_t* keys(int stage) {
    return queries() + kRows * kStride + stage * kStageElements;
  }
  __device__ static uint16_t* values(int stage) { return keys(stage) + kBlockTokens * kStride; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int row_warp() { return kRowWarps == 1 ? 0 : warp(); }
  __device__ static int first_token() { return kRowWarps == 1 ? warp() * kWarpTokens : 0; }
  // Of the lane's row i, in the tile.
  __device__ static int tile_row(int i) { return row_warp() * 16 + lane() / 4 + 8 * i; }

  __device__ int num_rows() const { return seq.num_rows * group; }
  __device__ int token_of(int row) const { return row / group; }
  __device__ int head_of(int row) const { return kv_head * group + row % group; }
  __device__ int position_of(int row) const { return seq.seq_len - seq.num_rows + token_of(row); }

  // Every position that the tile's rows see, cut to [begin, end).
  __device__ void place(int begin, int end) {
    const int last_row = first_row + kRows < num_rows() ? first_row + kRows : num_rows();
    range.begin = visible(p, position_of(first_row), seq.seq_len).begin;
    range.end = visible(p, position_of(last_row - 1), seq.seq_len).end;
    if (range.begin < begin) range.begin = begin;
    if (range.end > end) range.end = end;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + tile_row(i);
      const bool real = row < num_rows();
      row_position[i] = real ? position_of(row) : 0;
      const Range sees = real ? visible(p, row_position[i], seq.seq_len) : Range{0, 0};
      row_begin[i] = sees.begin > range.begin ? sees.begin : range.begin;
      row_end[i] = sees.end < range.end ? sees.end : range.end;
      slope[i] = real && p.alibi_slopes ? p.alibi_slopes[head_of(row)] : 0.0f;
      max[i] = -INFINITY;
      sum[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kMaxDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
    }
  }

  __device__ void load_queries() const {
    const int chunks = p.kv.layout.head_dim / 8;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * chunks; i += kTileThreads) {
      const int row = first_row + i / chunks, chunk = i % chunks;
      uint4 loaded = make_uint4(0, 0, 0, 0);
      if (row < num_rows()) {
        const int64_t token = seq.first_row + token_of(row);
        const auto* from = static_cast<const uint16_t*>(p.q) + token * p.q_stride_token +
                           head_of(row) * p.q_stride_head + chunk * 8;
        loaded = *reinterpret_cast<const uint4*>(from);
      }
      *reinterpret_cast<uint4*>(queries() + i / chunks * kStride + chunk * 8) = loaded;
    }
  }

  // Begins the copies of a block; slots that nothing may see become zeros, and are not read.
  __device__ void load_block(int block, int stage) const {
    constexpr int kRowLanes = 8;
    const KVLayout& layout = p.kv.layout;
    const int part = static_cast<int>(threadIdx.x) % kRowLanes;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kRowLanes; row < kBlockTokens;
         row += kTileThreads / kRowLanes) {
      const int position = block * kBlockTokens + row;
      bool valid = position >= range.begin && position < range.end;
      int64_t page = 0;
      if (valid) {
        const int64_t entry = seq.first_entry + position / layout.page_size;
        page = p.page_table[entry];
        if (page < 0 || page >= p.kv.num_pages) {
          if (part == 0) record_error(errors, BadEntry::kPageTable, entry, page);
          valid = false;
          page = 0;
        }
      }
      const int slot = valid ? position % layout.page_size : 0;
      const auto* k =
          static_cast<const uint16_t*>(p.kv.k) + layout.k.element(page, slot, kv_head, 0);
      const auto* v =
          static_cast<const uint16_t*>(p.kv.v) + layout.v.element(page, slot, kv_head, 0);
      for (int chunk = part; chunk < layout.head_dim / 8; chunk += kRowLanes) {
        copy_async(keys(stage) + row * kStride + chunk * 8, k + chunk * 8, valid);
      }
      for (int chunk = part; chunk < layout.head_dim_v / 8; chunk += kRowLanes) {
        copy_async(values(stage) + row * kStride + chunk * 8, v + chunk * 8, valid);
      }
    }
  }

  __device__ void attend_block(int block, int stage) {
    float scores[kWarpTokens / 8][4] = {};
    const int in_eight = lane() % 8, column = lane() / 8;
    for (int step = 0; step < p.kv.layout.head_dim / 16; ++step) {
      uint32_t rows[4];
      load_matrices(rows, queries() + (row_warp() * 16 + lane() % 16) * kStride + step * 16 +
                              lane() / 16 * 8);
#pragma unroll
      for (int i = 0; i < kWarpTokens / 16; ++i) {
        uint32_t k[4];
        load_matrices(k, keys(stage) +
                             (first_token() + i * 16 + column / 2 * 8 + in_eight) * kStride +
                             step * 16 + column % 2 * 8);
        multiply_add<kDType>(scores[2 * i], rows, k[0], k[1]);
        multiply_add<kDType>(scores[2 * i + 1], rows, k[2], k[3]);
      }
    }
    weigh(block, scores);
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i) {
      uint32_t weights[4], rests[4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const float* pair = &scores[2 * i + part / 2][part % 2 * 2];
        weights[part] = pack_halves<kDType>(pair[0], pair[1]);
        rests[part] = pack_halves<kDType>(pair[0] - half_of<kDType, 0>(weights[part]),
                                          pair[1] - half_of<kDType, 1>(weights[part]));
      }
#pragma unroll
      for (int dim = 0; dim < kMaxDim; dim += 16) {
        if (dim < p.kv.layout.head_dim_v) {
          uint32_t v[4];
          load_matrices_transposed(v, values(stage) +
                                          (first_token() + i * 16 + lane() % 16) * kStride + dim +
                                          lane() / 16 * 8);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply_add<kDType>(out[dim / 8 + half], weights, v[2 * half], v[2 * half + 1]);
            multiply_add<kDType>(out[dim / 8 + half], rests, v[2 * half], v[2 * half + 1]);
          }
        }
      }
    }
  }

  // Scores become weights, relative to the rows' new maxima.
  __device__ void weigh(int block, float (&scores)[kWarpTokens / 8][4]) {
    float new_max[2] = {max[0], max[1]};
#pragma unroll
    for (int i = 0; i < kWarpTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = j / 2;
        const int position = block * kBlockTokens + first_token() + i * 8 + lane() % 4 * 2 + j % 2;
        float score = scores[i][j] * p.scale;
        if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
        score += slope[row] * static_cast<float>(position - row_position[row]);
        const bool seen = position >= row_begin[row] && position < row_end[row];
        scores[i][j] = seen ? score * kLog2E : -INFINITY;
        new_max[row] = fmaxf(new_max[row], scores[i][j]);
      }
    }
    float shrink[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      new_max[row] = fmaxf(new_max[row], __shfl_xor_sync(0xffffffffu, new_max[row], 1));
      new_max[row] = fmaxf(new_max[row], __shfl_xor_sync(0xffffffffu, new_max[row], 2));
      shrink[row] = exp2_fast(max[row] - finite(new_max[row]));
      max[row] = new_max[row];
      sum[row] *= shrink[row];
    }
#pragma unroll
    for (int i = 0; i < kWarpTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = exp2_fast(scores[i][j] - finite(max[j / 2]));
        sum[j / 2] += scores[i][j];
      }
    }
#pragma unroll
    for (int i = 0; i < kMaxDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] *= shrink[j / 2];
    }
  }

  // A row that has seen nothing: no difference of infinities.
  __device__ static float finite(float max) { return max == -INFINITY ? 0.0f : max; }

  // All of the tile's range. Ends with nothing under way and shared memory free for other use.
  __device__ void attend() {
    load_queries();
    const int first = range.begin / kBlockTokens;
    const int end = range.end > range.begin ? (range.end + kBlockTokens - 1) / kBlockTokens : first;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (first + i < end) load_block(first + i, i);
      commit_copies();
    }
    for (int block = first; block < end; ++block) {
      wait_copies<kStages - 2>();
      __syncthreads();  // the block is there for all, and all are done with the one before it
      const int next = block + kStages - 1;
      if (next < end) load_block(next, (next - first) % kStages);
      commit_copies();
      attend_block(block, (block - first) % kStages);
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], 1);
      sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], 2);
    }
  }
};

}  // namespace kvlink::cuda
