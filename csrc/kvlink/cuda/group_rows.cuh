// The 64 rows that a warp group of a sm_90a kernel multiplies: what each sees, and its softmax.
#pragma once

#include "kvlink/cuda/prefill_tiles.cuh"

namespace kvlink::cuda {

inline constexpr int kGroupThreads = 128;
inline constexpr int kGroupRows = 64;
inline constexpr int kRowBytes = 128;  // of 64 elements
inline constexpr size_t kMaxBlockBytes = 227 << 10;
// Of blocks of three warp groups, one that copies and two that compute: registers of each thread
// that computes. NOTE: who asks for more than the block began with waits forever.
inline constexpr int kThreeGroupThreads = 3 * kGroupThreads;
constexpr int computing_registers(int copying) {
  constexpr int kBegin = 65536 / kThreeGroupThreads / 8 * 8;
  return (3 * kBegin - copying) / 2 / 8 * 8;
}

// The same value, which all lanes of the warp have: the compiler then keeps what follows from it in
// registers of the warp.
__device__ inline int of_warp(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// A tile's rows over the positions that they see, in blocks counted from position 0.
struct TileWork {
  SequencePlan seq;
  int kv_head, first_row;
  int first_position;  // that any row sees
  int first_block, end_block;
};

// `Ring` has args, p, thread (of the group) and group; rows_begin(), the group's first row in the
// tile, dims_begin(), its first column of out, and own_queries(), its rows in shared memory. kOut:
// columns of out that the group has. kGeneral: with softcap, ALiBi or a scale that is not positive.
template <typename Ring, DType kDType, int kTokens, int kOut, bool kGeneral>
struct GroupRows : Ring {
  using Ring::args, Ring::group, Ring::p, Ring::thread;

  // Of this lane's rows, g and g + 8 of its warp.
  int row_begin[2], row_end[2], row_position[2];
  float slope[2];
  int begin_of_all, end_of_all;  // positions that every row of the group sees
  // Running softmax: max is of scores in units where weights are powers of `base` = 2^unit; sums
  // are of this lane's columns alone.
  float max[2], sum[2];
  float scores[kTokens / 2];
  float out[kOut / 2];

  using Ring::Ring;

  __device__ int lane() const { return thread % 32; }
  __device__ int heads_each() const { return p.num_q_heads / p.kv.layout.num_kv_heads; }
  __device__ float unit() const { return kGeneral ? kLog2E : p.scale * kLog2E; }
  // Of the lane's row i, in the tile.
  __device__ int tile_row(int i) const {
    return this->rows_begin() + thread / 32 * 16 + lane() / 4 + 8 * i;
  }
  __device__ void release(uint64_t* free) const {
    if (lane() == 0) arrive(free);
  }

  // Begins the copies of the group's rows of queries by kThreads threads, of which this one is
  // `thread_of_all`, up to kDim dims; those that are not there become zeros.
  template <int kDim, int kThreads, int kUnroll>
  __device__ void copy_queries(const TileWork& work, int thread_of_all) const {
    constexpr int kChunks = kDim / 8;
#pragma unroll kUnroll
    for (int i = thread_of_all; i < kGroupRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int of_seq = work.first_row + this->rows_begin() + row;
      const bool real =
          of_seq < work.seq.num_rows * heads_each() && chunk * 8 < p.kv.layout.head_dim;
      const int64_t token = work.seq.first_row + of_seq / heads_each();
      const int head = work.kv_head * heads_each() + of_seq % heads_each();
      const auto* from = static_cast<const uint16_t*>(p.q);
      if (real) from += token * p.q_stride_token + head * p.q_stride_head + chunk * 8;
      copy_async(this->own_queries() + (chunk / 8 * kGroupRows + row) * kRowBytes +
                     (chunk % 8 ^ row % 8) * 16,
                 from, real);
    }
    commit_copies();
  }

  __device__ void place(const TileWork& work) {
    const int num_rows = work.seq.num_rows * heads_each();
    const auto sees = [&](int row, int* position) {
      *position = work.seq.seq_len - work.seq.num_rows + row / heads_each();
      return row < num_rows ? visible(p, *position, work.seq.seq_len) : Range{0, 0};
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.first_row + tile_row(i);
      const Range range = sees(row, &row_position[i]);
      row_begin[i] = range.begin;
      row_end[i] = range.end;
      slope[i] = 0.0f;
      if (kGeneral && row < num_rows && p.alibi_slopes) {
        slope[i] = p.alibi_slopes[work.kv_head * heads_each() + row % heads_each()];
      }
    }
    const int first = work.first_row + this->rows_begin();
    int position;
    end_of_all = of_warp(sees(first, &position).end);
    begin_of_all = of_warp(sees(std::min(first + kGroupRows, num_rows) - 1, &position).begin);
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kOut / 2; ++i) out[i] = 0.0f;
  }

  // Values of a block, [kColumns / 64][kTokens][64], that nobody sees become zeros: their weights
  // are 0, which does not help against a NaN.
  template <int kColumns>
  __device__ void clear_unseen_values(const TileWork& work, int block, char* values) const {
    const int first = block * kTokens;
    const int before = work.first_position - first;  // of the block's rows, which nobody sees
    const int after = work.seq.seq_len - first;      // from here on they are not of the sequence
    if (before <= 0 && after >= kTokens) return;
#pragma unroll 1
    for (int i = thread; i < kTokens * (kColumns / 8); i += kGroupThreads) {
      const int row = i / (kColumns / 8), chunk = i % (kColumns / 8);
      if (row >= before && row < after) continue;
      char* at = values + (chunk / 8 * kTokens + row) * kRowBytes + chunk % 8 * 16;
      *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
    publish_shared();
    this->sync_group();
  }

  // Scores become weights, relative to the rows' new maxima; `shrink` is what the old ones lose.
  __device__ void weigh(int block, float (&shrink)[2]) {
    const float unit = this->unit();
    const int first = block * kTokens + lane() % 4 * 2;
    if constexpr (kGeneral) {
      if (p.softcap > 0.0f) {  // tanh(x) = 1 - 2 / (e^(2x) + 1)
        const float factor = p.scale / p.softcap * 2.0f * kLog2E;
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          const float half = reciprocal_fast(exp2_fast(scores[i] * factor) + 1.0f);
          scores[i] = fmaf(-2.0f * p.softcap, half, p.softcap);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) scores[i] *= p.scale;
      }
      if (p.alibi_slopes) {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          const int row = i / 2 % 2;
          const auto distance = static_cast<float>(first - row_position[row]);
          scores[i] = fmaf(slope[row], distance + static_cast<float>(i / 4 * 8 + i % 2), scores[i]);
        }
      }
    }
    if (block * kTokens < begin_of_all || (block + 1) * kTokens > end_of_all) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        const int row = i / 2 % 2, position = first + i / 4 * 8 + i % 2;
        if (position < row_begin[row] || position >= row_end[row]) scores[i] = -INFINITY;
      }
    }
    float base[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float highest = max[row];
#pragma unroll
      for (int i = row * 2; i < kTokens / 2; i += 4) {
        highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      base[row] = highest == -INFINITY ? 0.0f : highest * unit;
      shrink[row] = exp2_fast(max[row] * unit - base[row]);
      max[row] = highest;
      sum[row] *= shrink[row];
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = i / 2 % 2;
      scores[i] = exp2_fast(fmaf(scores[i], unit, -base[row]));
      sum[row] += scores[i];
    }
  }

  // kParts: of each weight, that add up to it.
  template <int kParts>
  __device__ void round_weights(uint32_t (&weights)[kParts][kTokens / 16][4]) const {
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      const float low = scores[2 * i], high = scores[2 * i + 1];
      const uint32_t pair = pack_halves<kDType>(low, high);
      weights[0][i / 4][i % 4] = pair;
      if constexpr (kParts == 2) {
        weights[1][i / 4][i % 4] =
            pack_halves<kDType>(low - half_of<kDType, 0>(pair), high - half_of<kDType, 1>(pair));
      }
    }
  }

  __device__ void shrink_out(const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < kOut / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  __device__ void sum_lanes() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    }
  }
  // Sums being of all lanes.
  __device__ State state(int i) const {
    return {max[i] == -INFINITY ? max[i] : max[i] * unit(), sum[i]};
  }

  // The rows' results, of which states[i] are what `out` was divided from: written as q's dtype.
  // `keeps_lse`: by this group.
  __device__ void store(const TileWork& work, const State (&states)[2], bool keeps_lse) const {
    const int head_dim_v = p.kv.layout.head_dim_v, quarter = lane() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.first_row + tile_row(i);
      const bool real = row < work.seq.num_rows * heads_each();
      const int head = work.kv_head * heads_each() + row % heads_each();
      const int64_t token = work.seq.first_row + row / heads_each();
      const Denominator by = denominator(p, real ? head : 0, states[i]);
      if (real && keeps_lse && p.lse && quarter == 0) p.lse[token * p.num_q_heads + head] = by.lse;
      auto* to = static_cast<uint16_t*>(p.out);
      if (real) to += token * p.out_stride_token + head * p.out_stride_head;
#pragma unroll
      for (int first = 0; first < kOut; first += 32) {
        // Lane t of four has columns 2t and 2t + 1 of each eight; it gets all of the t-th eight.
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* two = &out[(first / 8 + j) * 4 + i * 2];
          pairs[j] = pack_halves<kDType>(two[0] * by.factor, two[1] * by.factor);
        }
#pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (j & bit) continue;
            const bool odd = quarter & bit;
            const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? pairs[j] : pairs[j | bit], bit);
            (odd ? pairs[j] : pairs[j | bit]) = got;
          }
        }
        const int dim = this->dims_begin() + first + quarter * 8;
        if (real && dim < head_dim_v) {
          *reinterpret_cast<uint4*>(to + dim) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    }
  }
};

}  // namespace kvlink::cuda
