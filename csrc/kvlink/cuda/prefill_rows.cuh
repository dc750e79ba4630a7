// A tile's rows: scores, weights and sums of the two warp groups that compute. The whole is
// described in prefill_ring.cuh.
#pragma once

#include "kvlink/cuda/prefill_ring.cuh"

namespace kvlink::cuda {

struct RowResult {
  float factor;  // of the row's out
  float lse;     // natural
};

__device__ inline RowResult row_result(const PagedAttentionParams& p, int head, float row_max,
                                       float row_sum) {
  if (row_max == -INFINITY) return {0.0f, -INFINITY};
  const float sink = p.sinks ? p.sinks[head] * kLog2E : -INFINITY;
  const float max = fmaxf(row_max, sink);
  const float shrink = exp2_fast(row_max - max);
  const float sum = row_sum * shrink + exp2_fast(sink - max);
  return {shrink / sum, max * kLn2 + logf(sum)};
}

// kGeneral: with softcap, ALiBi or a scale that is not positive. kParts: see WeightParts.
template <DType kDType, int kDim, int kDimV, bool kGeneral, int kParts>
struct PrefillRows : PrefillRing<kDim, kDimV> {
  using Ring = PrefillRing<kDim, kDimV>;
  using Ring::args, Ring::group, Ring::heads_each, Ring::lane, Ring::p, Ring::thread;
  using Ring::keys_free, Ring::keys_full, Ring::values_free, Ring::values_full;
  using Ring::kTokens;
  using Ring::queries, Ring::keys, Ring::values, Ring::stage_of, Ring::parity_of, Ring::find_work;
  // Products beside the softmax, and queries of the next tile beside this one's last products: as
  // far as registers last.
  static constexpr bool kOverlaps = kParts == 1 && kDimV <= 128;
  static constexpr bool kAhead = !kGeneral && kDimV <= 128;

  using Ring::Ring;

  // Of this lane's rows, g and g + 8 of its warp.
  int row_begin[2], row_end[2], row_position[2];
  float slope[2];
  int begin_of_all, end_of_all;  // positions that every row of the group sees
  // Running softmax: max is of scores in units where weights are powers of `base` = 2^unit; sums
  // are of this lane's columns alone.
  float max[2], sum[2];
  float scores[kTokens / 2];
  float out[kDimV / 2];
  uint32_t weights[kParts][kTokens / 16][4];

  __device__ int group_row() const { return group * kGroupRows; }
  // Of the lane's row i, in the tile.
  __device__ int tile_row(int i) const {
    return group_row() + thread / 32 * 16 + lane() / 4 + 8 * i;
  }

  __device__ void sync_group() const { sync_named(kOwn + group, kGroupThreads); }
  __device__ void release(uint64_t* free) const {
    if (lane() == 0) arrive(free);
  }

  // Begins the copies of a group's own rows; those that are not there become zeros.
  __device__ void load_queries(const PrefillWork& work) const {
    constexpr int kChunks = kDim / 8;
#pragma unroll(kAhead ? 4 : 1)
    for (int i = thread; i < kGroupRows * kChunks; i += kGroupThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int of_seq = work.first_row + group_row() + row;
      const bool real =
          of_seq < work.seq.num_rows * heads_each() && chunk * 8 < p.kv.layout.head_dim;
      const int64_t token = work.seq.first_row + of_seq / heads_each();
      const int head = work.kv_head * heads_each() + of_seq % heads_each();
      const auto* from = static_cast<const uint16_t*>(p.q);
      if (real) from += token * p.q_stride_token + head * p.q_stride_head + chunk * 8;
      copy_async(
          queries(group) + (chunk / 8 * kGroupRows + row) * kRowBytes + (chunk % 8 ^ row % 8) * 16,
          from, real);
    }
    commit_copies();
  }

  __device__ void place(const PrefillWork& work) {
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
      max[i] = -INFINITY;
      sum[i] = 0.0f;
    }
    const int first = work.first_row + group_row();
    int position;
    end_of_all = sees(first, &position).end;
    begin_of_all = sees(std::min(first + kGroupRows, num_rows) - 1, &position).begin;
#pragma unroll
    for (int i = 0; i < kDimV / 2; ++i) out[i] = 0.0f;
  }

  __device__ void begin_scores(int stage) {
    const uint64_t rows = rows_descriptor(queries(group));
    const uint64_t columns = rows_descriptor(keys(stage));
#pragma unroll
    for (int dim = 0; dim < kDim; dim += 16) {
      const int within = dim % 64 * 2, part = dim / 64 * kRowBytes;
      multiply_rows<kDType>(scores, rows + ((part * kGroupRows + within) >> 4),
                            columns + ((part * kTokens + within) >> 4), dim > 0);
    }
    commit_products();
  }

  __device__ void begin_values(int stage) {
    const uint64_t columns = columns_descriptor(values(stage), kTokens * kRowBytes);
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        multiply_columns<kDType>(out, weights[part][i], columns + (i * 16 * kRowBytes >> 4));
      }
    }
    commit_products();
  }

  // Weights there are 0, which does not help against a NaN.
  __device__ void clear_unseen_values(const PrefillWork& work, int block, int stage) const {
    const int first = block * kTokens;
    const int before = work.first_position - first;  // of the block's rows, which nobody sees
    const int after = work.seq.seq_len - first;      // from here on they are not of the sequence
    if (before <= 0 && after >= kTokens) return;
#pragma unroll 1
    for (int i = thread; i < kTokens * (kDimV / 8); i += kGroupThreads) {
      const int row = i / (kDimV / 8), chunk = i % (kDimV / 8);
      if (row >= before && row < after) continue;
      char* at = values(stage) + (chunk / 8 * kTokens + row) * kRowBytes + chunk % 8 * 16;
      *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
    publish_shared();
    sync_group();
  }

  // Scores become weights, relative to the rows' new maxima; `shrink` is what the old ones lose.
  __device__ void weigh(int block, float (&shrink)[2]) {
    const float unit = kGeneral ? kLog2E : p.scale * kLog2E;
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

  __device__ void round_weights() {
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
    for (int i = 0; i < kDimV / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  // Block n: scores, while nothing else is there to do. Values are there when it returns.
  __device__ void first_scores(int block, int n) {
    wait_phase(keys_full(stage_of(n)), parity_of(n));
    begin_products();
    begin_scores(stage_of(n));
    wait_products<0>(scores);
    release(keys_free(stage_of(n)));
    float shrink[2];
    weigh(block, shrink);
    shrink_out(shrink);
    round_weights();
    wait_phase(values_full(stage_of(n)), parity_of(n));
  }

  // Block n: scores; block n - 1, one position further: values.
  __device__ void attend_next(const PrefillWork& work, int block, int n) {
    const int before = stage_of(n - 1), stage = stage_of(n);
    wait_phase(keys_full(stage), parity_of(n));
    clear_unseen_values(work, block + 1, before);
    sync_named(kTurn + group, kGroups * kGroupThreads);
    begin_products();
    begin_scores(stage);
    begin_values(before);
    arrive_named(kTurn + 1 - group, kGroups * kGroupThreads);
    wait_products<1>(scores);
    release(keys_free(stage));
    float shrink[2];
    weigh(block, shrink);
    // NOTE: in between, not where the values are needed: without something to loop over, ptxas
    // moves the wait for the products before the softmax.
    wait_phase(values_full(stage), parity_of(n));
    wait_products<0>(out);
    release(values_free(before));
    shrink_out(shrink);
    round_weights();
  }

  __device__ void last_values(const PrefillWork& work, int block, int n) {
    clear_unseen_values(work, block, stage_of(n));
    begin_products();
    begin_values(stage_of(n));
    wait_products<0>(out);
    release(values_free(stage_of(n)));
  }

  __device__ void store(const PrefillWork& work) {
    const int head_dim_v = p.kv.layout.head_dim_v, quarter = lane() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      const int row = work.first_row + tile_row(i);
      const bool real = row < work.seq.num_rows * heads_each();
      const int head = work.kv_head * heads_each() + row % heads_each();
      const int64_t token = work.seq.first_row + row / heads_each();
      const float unit = kGeneral ? kLog2E : p.scale * kLog2E;
      const RowResult by =
          row_result(p, real ? head : 0, max[i] == -INFINITY ? max[i] : max[i] * unit, sum[i]);
      if (real && p.lse && quarter == 0) p.lse[token * p.num_q_heads + head] = by.lse;
      auto* to = static_cast<uint16_t*>(p.out);
      if (real) to += token * p.out_stride_token + head * p.out_stride_head;
#pragma unroll
      for (int first = 0; first < kDimV; first += 32) {
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
        const int dim = first + quarter * 8;
        if (real && dim < head_dim_v) {
          *reinterpret_cast<uint4*>(to + dim) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    }
  }

  // Every block that the tile sees, and n more blocks taken; queries are there.
  __device__ void attend_tile(const PrefillWork& work, int& n) {
    int block = work.end_block - 1;
    if (block < work.first_block) return;
    first_scores(block, n);
    while (--block >= work.first_block) {
      if constexpr (kOverlaps) {
        attend_next(work, block, ++n);
      } else {
        last_values(work, block + 1, n++);
        first_scores(block, n);
      }
    }
  }

  __device__ void attend_all() {
    if (kOverlaps && group == 1) arrive_named(kTurn, kGroups * kGroupThreads);
    PrefillWork work;
    int n = 0;  // blocks taken
    bool more = find_work(0, work);
    if (kAhead && more) load_queries(work);
    for (int round = 1; more; ++round) {
      PrefillWork next;
      if constexpr (kAhead) {
        more = find_work(round, next);
      } else {
        load_queries(work);
      }
      place(work);
      wait_copies<0>();
      publish_shared();
      sync_group();
      attend_tile(work, n);
      sync_group();  // everybody is done with the queries
      if (kAhead && more) load_queries(next);
      if (work.end_block > work.first_block) last_values(work, work.first_block, n++);
      store(work);
      if constexpr (kAhead) {
        work = next;
      } else {
        more = find_work(round, work);
      }
    }
    if (kOverlaps && group == 0) sync_named(kTurn, kGroups * kGroupThreads);
  }
};

}  // namespace kvlink::cuda
