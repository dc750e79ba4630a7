// One tile of query rows against a run of positions, on tensor cores: decode (16 rows, warps share
// each block of positions) and extend (64 rows, 16 to a warp).
//
// Positions are taken in blocks, counted from position 0. The scores' block is a product of 16-bit
// values with float32 sums. Queries of the products' dtype enter it as they are, and the weights
// are rounded to that dtype before they meet V. Queries of another dtype, and then the weights,
// too, are two parts, a rounded value and the rest, exact to 2^-16: results are as close as those
// of float32.
#pragma once

#include "kvlink/cuda/attention_rows.cuh"
#include "kvlink/cuda/attention_stored.cuh"

namespace kvlink::cuda {

// kMaxDim: head_dim and head_dim_v are at most this. kRowWarps: warps side by side over the rows;
// the others share them, each with its part of every block. kParts: of queries and weights.
template <DType kKV, int kMaxDim, int kRowWarps, int kParts>
struct AttentionTile : TileRows<2, kMaxDim / 8> {
  using Base = TileRows<2, kMaxDim / 8>;
  using Stored = StoredRows<kKV, kMaxDim>;
  static constexpr DType kMma = Stored::kMma;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kResident = 2;  // blocks on a processor that registers must suffice for
  static constexpr int kSplitTokens = kRowWarps == 1 ? kDecodeSplitTokens : 1024;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kLaneRows = 2;
  static constexpr int kColumns = kMaxDim / 8;
  static constexpr int kPositionWarps = kWarps / kRowWarps;
  static constexpr int kBlockTokens = kMaxDim > 128 && kRowWarps > 1 ? 32 : 64;
  static constexpr int kWarpTokens = kBlockTokens / kPositionWarps;
  static constexpr int kStages = (kMaxDim <= 128 ? 3 : 2) + Stored::kBytes;
  static constexpr int kScaleBytes = Stored::kBytes ? 2 * kBlockTokens * 4 : 0;
  static constexpr int kPlaneBytes = kBlockTokens * Stored::kRowBytes;
  static constexpr int kStageBytes = 2 * kPlaneBytes + kScaleBytes;
  using Queries = QueryRows<kKV, kMaxDim, kRows, kParts>;
  static constexpr size_t kFactsAt = Queries::kSharedBytes + size_t{kStages} * kStageBytes;
  static constexpr size_t kSharedBytes = kFactsAt + kRows * sizeof(RowFacts);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  __device__ AttentionTile(const Args& args, const SequencePlan& plan, int head, int row)
      : Base(args, plan, head, row, row_warp() * 16,
             reinterpret_cast<RowFacts*>(shared_memory() + kFactsAt)) {}

  __device__ static int row_warp() { return kRowWarps == 1 ? 0 : Base::warp(); }
  __device__ static int first_token() { return kRowWarps == 1 ? Base::warp() * kWarpTokens : 0; }
  __device__ static uint16_t* queries() { return reinterpret_cast<uint16_t*>(shared_memory()); }
  __device__ static char* keys(int stage) {
    return shared_memory() + Queries::kSharedBytes + stage * kStageBytes;
  }
  __device__ static char* values(int stage) { return keys(stage) + kPlaneBytes; }
  // Of K, then of V.
  __device__ static float* scales(int stage) {
    return reinterpret_cast<float*>(keys(stage) + 2 * kPlaneBytes);
  }
  __device__ static int dim_of(int column, int half) { return Stored::dim_of(column, half); }
  // This lane tells of its rows' maxima and sums.
  __device__ static bool owns_state() { return Base::lane() % 4 == 0; }

  __device__ void load_queries() const {
    Queries::load(*this, queries(), kThreads, this->p.kv.layout.head_dim);
  }

  // Begins the copies of a block; slots that nothing may see become zeros, and are not read.
  __device__ void load_block(int block, int stage) const {
    constexpr int kRowLanes = 8;
    const KVLayout& layout = this->p.kv.layout;
    const LayerView& kv = this->p.kv;
    const int part = static_cast<int>(threadIdx.x) % kRowLanes;
    const int padded_v = Stored::kBytes ? (layout.head_dim_v + 31) / 32 * 32 : layout.head_dim_v;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kRowLanes; row < kBlockTokens;
         row += kThreads / kRowLanes) {
      const int position = block * kBlockTokens + row;
      const bool needed = position >= this->range.begin && position < this->range.end;
      const Slot at = locate(this->args, this->seq, position, needed, part == 0);
      Stored::template copy_row<kRowLanes>(
          keys(stage) + row * Stored::kRowBytes,
          static_cast<const char*>(kv.k) +
              layout.k.element(at.page, at.slot, this->kv_head, 0) * Stored::kSize,
          layout.head_dim, layout.head_dim, at.valid);
      Stored::template copy_row<kRowLanes>(
          values(stage) + row * Stored::kRowBytes,
          static_cast<const char*>(kv.v) +
              layout.v.element(at.page, at.slot, this->kv_head, 0) * Stored::kSize,
          layout.head_dim_v, padded_v, at.valid);
      if (Stored::kBytes && layout.has_scales() && part < 2) {
        const float* from = part == 0 ? kv.k_scale : kv.v_scale;
        const Plane& plane = part == 0 ? layout.k_scale : layout.v_scale;
        copy_async_word(scales(stage) + part * kBlockTokens + row,
                        from + plane.element(at.page, at.slot, this->kv_head, 0), at.valid);
      }
    }
  }

  __device__ void attend_block(int block, int stage) {
    const PagedAttentionParams& p = this->p;
    float scores[kWarpTokens / 8][4] = {};
    for (int step = 0; step < p.kv.layout.head_dim / 16; ++step) {
      uint32_t rows[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Queries::take(rows[part], queries(), part, row_warp() * 16, step);
      }
#pragma unroll
      for (int i = 0; i < kWarpTokens / 16; ++i) {
        uint32_t k[2][2];
        Stored::keys(k, keys(stage), first_token() + i * 16, step);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          multiply_add<kMma>(scores[2 * i], rows[part], k[0][0], k[0][1]);
          multiply_add<kMma>(scores[2 * i + 1], rows[part], k[1][0], k[1][1]);
        }
      }
    }
    weigh(block, stage, scores);
    const int position = block * kBlockTokens + first_token();
    if (this->hides(position, position + kWarpTokens)) {
      bool special = false;
      add_values<true>(stage, scores, &special);
      if (__any_sync(0xffffffffu, special)) {
        this->template add_special<Stored>(
            values(stage), first_token(), kWarpTokens, position, 0,
            [&](int i, int token) { return weight_of(scores, i, token); });
      }
    } else {
      add_values<false>(stage, scores, nullptr);
    }
  }

  // Of a token of the warp's, from the lane that has it.
  __device__ static float weight_of(const float (&scores)[kWarpTokens / 8][4], int i, int token) {
    float mine = 0.0f;
#pragma unroll
    for (int j = 0; j < kWarpTokens / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (token / 8 == j && token % 2 == half) mine = scores[j][i * 2 + half];
      }
    }
    return __shfl_sync(0xffffffffu, mine, Base::lane() / 4 * 4 + token % 8 / 2);
  }

  // kCareful: values that are not finite are left out, and noted.
  template <bool kCareful>
  __device__ void add_values(int stage, const float (&scores)[kWarpTokens / 8][4], bool* special) {
    constexpr int kTogether = Stored::kValueColumns;
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i) {
      uint32_t weights[kParts][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &scores[2 * i + j / 2][j % 2 * 2];
        weights[0][j] = pack_halves<kMma>(pair[0], pair[1]);
        if constexpr (kParts == 2) {
          weights[1][j] = pack_halves<kMma>(pair[0] - half_of<kMma, 0>(weights[0][j]),
                                            pair[1] - half_of<kMma, 1>(weights[0][j]));
        }
      }
#pragma unroll
      for (int column = 0; column < kColumns; column += kTogether) {
        if (column * 8 < this->p.kv.layout.head_dim_v) {
          uint32_t v[kTogether][2];
          Stored::values(v, values(stage), first_token() + i * 16, column * 8);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            if constexpr (kCareful) {
              v[j][0] = finite_pair<kMma>(v[j][0], special);
              v[j][1] = finite_pair<kMma>(v[j][1], special);
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              multiply_add<kMma>(this->out[0][column + j], weights[part], v[j][0], v[j][1]);
            }
          }
        }
      }
    }
  }

  // Products become weights, relative to the rows' new maxima.
  __device__ void weigh(int block, int stage, float (&scores)[kWarpTokens / 8][4]) {
    const bool scaled = Stored::kBytes && this->p.kv.layout.has_scales();
    const RowFacts rows[2] = {this->facts[this->tile_row(0)], this->facts[this->tile_row(1)]};
    float new_max[2] = {this->max[0], this->max[1]};
#pragma unroll
    for (int i = 0; i < kWarpTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = first_token() + i * 8 + Base::lane() % 4 * 2 + j % 2;
        float product = scores[i][j];
        if (scaled) product *= scales(stage)[token];
        scores[i][j] = this->score(j / 2, rows[j / 2], block * kBlockTokens + token, product);
        new_max[j / 2] = fmaxf(new_max[j / 2], scores[i][j]);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      new_max[row] = fmaxf(new_max[row], __shfl_xor_sync(0xffffffffu, new_max[row], 1));
      new_max[row] = fmaxf(new_max[row], __shfl_xor_sync(0xffffffffu, new_max[row], 2));
    }
    this->raise_max(new_max);
#pragma unroll
    for (int i = 0; i < kWarpTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool seen = scores[i][j] != -INFINITY;
        scores[i][j] = exp2_fast(scores[i][j] - finite(this->max[j / 2]));
        this->sum[j / 2] += scores[i][j];
        if (scaled) {  // the scale of a slot that is not seen may be anything
          const int token = first_token() + i * 8 + Base::lane() % 4 * 2 + j % 2;
          scores[i][j] = seen ? scores[i][j] * scales(stage)[kBlockTokens + token] : 0.0f;
        }
      }
    }
  }

  // Sums over a row's lanes.
  __device__ void finish_split() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      this->sum[row] += __shfl_xor_sync(0xffffffffu, this->sum[row], 1);
      this->sum[row] += __shfl_xor_sync(0xffffffffu, this->sum[row], 2);
    }
  }
};

}  // namespace kvlink::cuda
