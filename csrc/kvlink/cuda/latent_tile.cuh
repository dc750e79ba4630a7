// One tile of query rows against latent pages (MLA), whose V is the first head_dim_v values of K:
// each block of positions is read once, for both products.
//
// For the scores, each of the eight warps has half of the 32 query rows and a fourth of a block's
// positions; the weights then go through shared memory, and each warp takes all rows of them by an
// eighth of the dims of V. Products are as in attention_tile.cuh.
#pragma once

#include "kvlink/cuda/attention_rows.cuh"
#include "kvlink/cuda/attention_stored.cuh"

namespace kvlink::cuda {

inline constexpr int kLatentDim = 576, kLatentDimV = 512;

// kParts: of the queries, and of the weights.
template <DType kKV, int kParts>
struct LatentTile : TileRows<4, kLatentDimV / 8 / 8> {
  using Base = TileRows<4, kLatentDimV / 8 / 8>;
  using Stored = StoredRows<kKV, kLatentDim>;
  static constexpr DType kMma = Stored::kMma;
  static constexpr int kRows = 32;
  static constexpr int kThreads = 256;
  static constexpr int kResident = 1;
  static constexpr int kSplitTokens = kDecodeSplitTokens;
  static constexpr int kLaneRows = 4;
  static constexpr int kColumns = kLatentDimV / 8 / 8;
  static constexpr int kBlockTokens = 32;
  static constexpr int kWarpDims = kLatentDimV / 8;
  static constexpr int kStages = (kParts == 1 ? 3 : 2) + Stored::kBytes;
  static constexpr int kRowsBytes = kBlockTokens * Stored::kRowBytes;
  static constexpr int kStageBytes = kRowsBytes + (Stored::kBytes ? kBlockTokens * 4 : 0);
  static constexpr int kWeightStride = kBlockTokens + 8;  // of a row of weights, as of their rests
  using Queries = QueryRows<kKV, kLatentDim, kRows, kParts>;
  static constexpr size_t kWeightBytes = size_t{2} * kParts * kRows * kWeightStride;
  static constexpr size_t kResultsAt =
      Queries::kSharedBytes + size_t{kStages} * kStageBytes + kWeightBytes;
  static constexpr size_t kFactsAt = kResultsAt + size_t{4} * 4 * kRows;
  static constexpr size_t kSharedBytes = kFactsAt + kRows * sizeof(RowFacts);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  __device__ LatentTile(const Args& args, const SequencePlan& plan, int head, int row)
      : Base(args, plan, head, row, 0, reinterpret_cast<RowFacts*>(shared_memory() + kFactsAt)) {}

  __device__ static int part() { return Base::warp() % 4; }  // of the positions
  __device__ static int half() { return Base::warp() / 4; }  // of the rows, for the scores
  __device__ static int first_dim() { return Base::warp() * kWarpDims; }
  __device__ static uint16_t* queries() { return reinterpret_cast<uint16_t*>(shared_memory()); }
  __device__ static char* latents(int stage) {
    return shared_memory() + Queries::kSharedBytes + stage * kStageBytes;
  }
  __device__ static float* scales(int stage) {
    return reinterpret_cast<float*>(latents(stage) + kRowsBytes);
  }
  // [kParts][kRows][kWeightStride]: 16-bit weights, then their rests.
  __device__ static uint16_t* weights() { return reinterpret_cast<uint16_t*>(latents(kStages)); }
  // [4][kRows]: of each part of the positions.
  __device__ static float* part_results() {
    return reinterpret_cast<float*>(shared_memory() + kResultsAt);
  }
  __device__ static int dim_of(int column, int half) {
    return first_dim() + Stored::dim_of(column, half);
  }
  __device__ static bool owns_state() { return Base::warp() == 0 && Base::lane() % 4 == 0; }
  __device__ int padded_dim() const { return (this->p.kv.layout.head_dim + 31) / 32 * 32; }

  __device__ void load_queries() const { Queries::load(*this, queries(), kThreads, padded_dim()); }

  // Begins the copies of a block; slots that nothing may see become zeros, and are not read.
  __device__ void load_block(int block, int stage) const {
    constexpr int kRowLanes = 8;
    const KVLayout& layout = this->p.kv.layout;
    const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
    for (int row = static_cast<int>(threadIdx.x) / kRowLanes; row < kBlockTokens;
         row += kThreads / kRowLanes) {
      const int position = block * kBlockTokens + row;
      const bool needed = position >= this->range.begin && position < this->range.end;
      const Slot at = locate(this->args, this->seq, position, needed, lane == 0);
      Stored::template copy_row<kRowLanes>(
          latents(stage) + row * Stored::kRowBytes,
          static_cast<const char*>(this->p.kv.k) +
              layout.k.element(at.page, at.slot, this->kv_head, 0) * Stored::kSize,
          layout.head_dim, padded_dim(), at.valid);
      if (Stored::kBytes && layout.has_scales() && lane == 0) {
        copy_async_word(
            scales(stage) + row,
            this->p.kv.k_scale + layout.k_scale.element(at.page, at.slot, this->kv_head, 0),
            at.valid);
      }
    }
  }

  __device__ void attend_block(int block, int stage) {
    float scores[4] = {};  // 16 rows x 8 positions
    for (int step = 0; step < padded_dim() / 32; ++step) {
      uint32_t k[2][2];
      Stored::keys_of_eight(k, latents(stage), part() * 8, step);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int q_part = 0; q_part < kParts; ++q_part) {
          uint32_t rows[4];
          Queries::take(rows, queries(), q_part, half() * 16, step * 2 + i);
          multiply_add<kMma>(scores, rows, k[i][0], k[i][1]);
        }
      }
    }
    weigh(block, stage, scores);
    __syncthreads();  // the weights are there
    const int position = block * kBlockTokens;
    if (this->hides(position, position + kBlockTokens)) {
      bool special = false;
      add_values<true>(stage, &special);
      if (__any_sync(0xffffffffu, special)) {
        this->template add_special<Stored>(
            latents(stage), 0, kBlockTokens, position, first_dim(), [&](int i, int token) {
              const int at = this->tile_row(i) * kWeightStride + token;
              const float weight = half_of<kMma, 0>(weights()[at]);
              if constexpr (kParts == 1) return weight;
              return weight + half_of<kMma, 0>(weights()[kRows * kWeightStride + at]);
            });
      }
    } else {
      add_values<false>(stage, nullptr);
    }
  }

  // Products become weights, relative to the rows' new maxima over all positions of the block.
  __device__ void weigh(int block, int stage, float (&scores)[4]) {
    const bool scaled = Stored::kBytes && this->p.kv.layout.has_scales();
    const int first = part() * 8 + Base::lane() % 4 * 2;  // of this lane's two positions
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slot = half() * 2 + i;
      const RowFacts row = this->facts[this->tile_row(slot)];
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& score = scores[i * 2 + j];
        if (scaled) score *= scales(stage)[first + j];
        score = this->score(slot, row, block * kBlockTokens + first + j, score);
        largest = fmaxf(largest, score);
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      if (Base::lane() % 4 == 0) part_results()[part() * kRows + this->tile_row(slot)] = largest;
    }
    __syncthreads();
    float new_max[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      new_max[i] = this->max[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        new_max[i] = fmaxf(new_max[i], part_results()[j * kRows + this->tile_row(i)]);
      }
    }
    this->raise_max(new_max);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float max = finite(half() == 0 ? new_max[i] : new_max[2 + i]);
      float pair[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float score = scores[i * 2 + j];
        pair[j] = exp2_fast(score - max);
        if (half() == 0) this->sum[i] += pair[j];
        if (half() == 1) this->sum[2 + i] += pair[j];
        if (scaled) pair[j] = score != -INFINITY ? pair[j] * scales(stage)[first + j] : 0.0f;
      }
      const uint32_t rounded = pack_halves<kMma>(pair[0], pair[1]);
      const int row = this->tile_row(half() * 2 + i);
      auto* to = reinterpret_cast<uint32_t*>(weights() + row * kWeightStride + first);
      to[0] = rounded;
      if constexpr (kParts == 2) {
        to[kRows * kWeightStride / 2] = pack_halves<kMma>(pair[0] - half_of<kMma, 0>(rounded),
                                                          pair[1] - half_of<kMma, 1>(rounded));
      }
    }
  }

  // kCareful: values that are not finite are left out, and noted.
  template <bool kCareful>
  __device__ void add_values(int stage, bool* special) {
    constexpr int kTogether = Stored::kValueColumns;
#pragma unroll
    for (int i = 0; i < kBlockTokens / 16; ++i) {
      uint32_t by[2][kParts][4];  // [m][weights, rests]
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int rest = 0; rest < kParts; ++rest) {
          const int row = m * 16 + Base::lane() % 16;
          load_matrices(by[m][rest], weights() + (rest * kRows + row) * kWeightStride + i * 16 +
                                         Base::lane() / 16 * 8);
        }
      }
#pragma unroll
      for (int column = 0; column < kColumns; column += kTogether) {
        const int dim = first_dim() + column * 8;
        if (dim < this->p.kv.layout.head_dim_v) {
          uint32_t v[kTogether][2];
          Stored::values(v, latents(stage), i * 16, dim);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            if constexpr (kCareful) {
              v[j][0] = finite_pair<kMma>(v[j][0], special);
              v[j][1] = finite_pair<kMma>(v[j][1], special);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
              for (int part = 0; part < kParts; ++part) {
                multiply_add<kMma>(this->out[m][column + j], by[m][part], v[j][0], v[j][1]);
              }
            }
          }
        }
      }
    }
  }

  // Sums over a row's lanes, and over the warps that share it.
  __device__ void finish_split() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      this->sum[i] += __shfl_xor_sync(0xffffffffu, this->sum[i], 1);
      this->sum[i] += __shfl_xor_sync(0xffffffffu, this->sum[i], 2);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i / 2 == half() && Base::lane() % 4 == 0) {
        part_results()[part() * kRows + this->tile_row(i)] = this->sum[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      this->sum[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) this->sum[i] += part_results()[j * kRows + this->tile_row(i)];
    }
    __syncthreads();
  }
};

}  // namespace kvlink::cuda
