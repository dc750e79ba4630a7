// One tile of query rows against a run of positions whose K and V are float32, by ordinary FMAs, so
// that products are as exact as those of the reference. It is there for runs that others are
// compared with; nothing about it is fast.
//
// For the scores, each of the four warps has all rows by a fourth of a block's positions; the
// weights then go through shared memory, and each warp takes all rows of them by a fourth of the
// dims of V.
#pragma once

#include "kvlink/cuda/attention_rows.cuh"
#include "kvlink/cuda/attention_stored.cuh"

namespace kvlink::cuda {

// kLatent: V is the first values of K, which is read once for both.
template <int kMaxDim, int kMaxDimV, bool kLatent>
struct FloatTile : TileRows<2, kMaxDimV / 4 / 8> {
  using Base = TileRows<2, kMaxDimV / 4 / 8>;
  using Stored = StoredRows<DType::kFloat32, kMaxDim>;
  static constexpr int kRows = 16;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kResident = 1;
  static constexpr int kSplitTokens = kDecodeSplitTokens;
  static constexpr int kLaneRows = 2;
  static constexpr int kColumns = kMaxDimV / kWarps / 8;
  static constexpr int kBlockTokens = kLatent ? 16 : 32;
  static constexpr int kLaneTokens = kBlockTokens / kWarps / 4;
  static constexpr int kStages = 2;
  static constexpr int kPlaneBytes = kBlockTokens * Stored::kRowBytes;
  static constexpr int kStageBytes = kLatent ? kPlaneBytes : 2 * kPlaneBytes;
  static constexpr int kWeightStride = kBlockTokens + 4;
  static constexpr size_t kQueryBytes = size_t{kRows} * Stored::kRowBytes;
  static constexpr size_t kWeightsAt = kQueryBytes + size_t{kStages} * kStageBytes;
  static constexpr size_t kResultsAt = kWeightsAt + size_t{4} * kRows * kWeightStride;
  static constexpr size_t kFactsAt = kResultsAt + size_t{4} * kWarps * kRows;
  static constexpr size_t kSharedBytes = kFactsAt + kRows * sizeof(RowFacts);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static constexpr float kUnseen = -1.0f;  // in place of a weight

  __device__ FloatTile(const Args& args, const SequencePlan& plan, int head, int row)
      : Base(args, plan, head, row, 0, reinterpret_cast<RowFacts*>(shared_memory() + kFactsAt)) {}

  __device__ static int first_dim() { return Base::warp() * (kMaxDimV / kWarps); }
  // Of a block, of this lane's tokens.
  __device__ static int first_token() {
    return Base::warp() * (kBlockTokens / kWarps) + Base::lane() % 4 * kLaneTokens;
  }
  __device__ static float* row_of(char* rows, int row) {
    return reinterpret_cast<float*>(rows + row * Stored::kRowBytes);
  }
  __device__ static char* keys(int stage) {
    return shared_memory() + kQueryBytes + stage * kStageBytes;
  }
  __device__ static char* values(int stage) { return keys(stage) + (kLatent ? 0 : kPlaneBytes); }
  __device__ static float* weights() {  // [kRows][kWeightStride]
    return reinterpret_cast<float*>(shared_memory() + kWeightsAt);
  }
  __device__ static float* part_results() {  // [kWarps][kRows]
    return reinterpret_cast<float*>(shared_memory() + kResultsAt);
  }
  __device__ static int dim_of(int column, int half) {
    return first_dim() + Stored::dim_of(column, half);
  }
  __device__ static bool owns_state() { return Base::warp() == 0 && Base::lane() % 4 == 0; }

  __device__ void load_queries() const {
    const PagedAttentionParams& p = this->p;
    const int chunks = p.kv.layout.head_dim / kVector;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * chunks; i += kThreads) {
      const int row = this->first_row + i / chunks, dim = i % chunks * kVector;
      float* to = row_of(shared_memory(), i / chunks) + dim;
      float q[kVector] = {};
      if (row < this->num_rows()) {
        const int64_t token = this->seq.first_row + this->token_of(row);
        const int64_t at = token * p.q_stride_token + this->head_of(row) * p.q_stride_head + dim;
        load_values(p.q_dtype, static_cast<const char*>(p.q) + at * dtype_bytes(p.q_dtype), 1,
                    kVector, q);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[j] = q[j];
    }
  }

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
      const auto copy = [&](char* rows, const void* from, const Plane& plane, int dims) {
        Stored::template copy_row<kRowLanes>(
            rows + row * Stored::kRowBytes,
            static_cast<const float*>(from) + plane.element(at.page, at.slot, this->kv_head, 0),
            dims, dims, at.valid);
      };
      copy(keys(stage), this->p.kv.k, layout.k, layout.head_dim);
      if (!kLatent) copy(values(stage), this->p.kv.v, layout.v, layout.head_dim_v);
    }
  }

  __device__ void attend_block(int block, int stage) {
    float scores[2][kLaneTokens] = {};
    const int head_dim = this->p.kv.layout.head_dim;
    for (int dim = 0; dim < head_dim; dim += 4) {
      float4 q[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        q[i] = *reinterpret_cast<const float4*>(row_of(shared_memory(), this->tile_row(i)) + dim);
      }
#pragma unroll
      for (int j = 0; j < kLaneTokens; ++j) {
        const float4 k =
            *reinterpret_cast<const float4*>(row_of(keys(stage), first_token() + j) + dim);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& sum = scores[i][j];
          sum = __fmaf_rn(q[i].x, k.x, sum);
          sum = __fmaf_rn(q[i].y, k.y, sum);
          sum = __fmaf_rn(q[i].z, k.z, sum);
          sum = __fmaf_rn(q[i].w, k.w, sum);
        }
      }
    }
    weigh(block, scores);
    __syncthreads();  // the weights are there
    add_values(stage);
  }

  // Products become weights, relative to the rows' new maxima over all positions of the block.
  __device__ void weigh(int block, float (&scores)[2][kLaneTokens]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowFacts row = this->facts[this->tile_row(i)];
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kLaneTokens; ++j) {
        const int position = block * kBlockTokens + first_token() + j;
        scores[i][j] = this->score(i, row, position, scores[i][j]);
        largest = fmaxf(largest, scores[i][j]);
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      if (Base::lane() % 4 == 0) part_results()[Base::warp() * kRows + this->tile_row(i)] = largest;
    }
    __syncthreads();
    float new_max[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      new_max[i] = this->max[i];
#pragma unroll
      for (int j = 0; j < kWarps; ++j) {
        new_max[i] = fmaxf(new_max[i], part_results()[j * kRows + this->tile_row(i)]);
      }
    }
    this->raise_max(new_max);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowFacts row = this->facts[this->tile_row(i)];
      float* to = weights() + this->tile_row(i) * kWeightStride + first_token();
#pragma unroll
      for (int j = 0; j < kLaneTokens; ++j) {
        const float weight = exp2_fast(scores[i][j] - finite(new_max[i]));
        this->sum[i] += weight;
        // NOTE: a score of -inf may also be that of a K which is seen.
        const int position = block * kBlockTokens + first_token() + j;
        to[j] = this->sees(i, row, position) ? weight : kUnseen;
      }
    }
  }

  // NOTE: what a row does not see is no term of its sum, since 0 times NaN would be one.
  __device__ void add_values(int stage) {
    const int head_dim_v = this->p.kv.layout.head_dim_v;
#pragma unroll 2
    for (int token = 0; token < kBlockTokens; ++token) {
      const float* v = row_of(values(stage), token);
      float by[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) by[i] = weights()[this->tile_row(i) * kWeightStride + token];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int dim = dim_of(j, 0);
        if (dim >= head_dim_v) break;
        const float2 pair = *reinterpret_cast<const float2*>(v + dim);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (by[i] == kUnseen) continue;
          float* out = &this->out[0][j][2 * i];
          out[0] = __fmaf_rn(by[i], pair.x, out[0]);
          out[1] = __fmaf_rn(by[i], pair.y, out[1]);
        }
      }
    }
  }

  // Sums over a row's lanes, and over the warps that share it.
  __device__ void finish_split() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      this->sum[i] += __shfl_xor_sync(0xffffffffu, this->sum[i], 1);
      this->sum[i] += __shfl_xor_sync(0xffffffffu, this->sum[i], 2);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (Base::lane() % 4 == 0) {
        part_results()[Base::warp() * kRows + this->tile_row(i)] = this->sum[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      this->sum[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) {
        this->sum[i] += part_results()[j * kRows + this->tile_row(i)];
      }
    }
    __syncthreads();
  }
};

}  // namespace kvlink::cuda
