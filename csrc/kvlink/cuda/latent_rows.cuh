// An item's rows: scores, weights and sums of the two warp groups that compute. The whole is
// described in latent_ring.cuh.
#pragma once

#include "kvlink/cuda/attention_kernels.cuh"
#include "kvlink/cuda/latent_ring.cuh"

namespace kvlink::cuda {

// kGeneral: with softcap, ALiBi or a scale that is not positive.
template <DType kDType, bool kGeneral>
struct LatentRows : GroupRows<LatentRing, kDType, kLatentTokens,
                              kLatentValueParts / kLatentGroups * 64, kGeneral> {
  static constexpr int kOut = kLatentValueParts / kLatentGroups * 64;
  using Rows = GroupRows<LatentRing, kDType, kLatentTokens, kOut, kGeneral>;
  using Rows::lane, Rows::max, Rows::out, Rows::p, Rows::scores, Rows::sum, Rows::unit;
  // As Running sees a tile.
  static constexpr int kLaneRows = 2, kColumns = kOut / 8;
  static constexpr int kThreads = kLatentGroups * kGroupThreads;
  using Weights = uint32_t[1][kLatentTokens / 16][4];

  State folded[2];  // what the outputs are of, after several splits

  using Rows::Rows;

  __device__ int thread_of_both() const { return this->group * kGroupThreads + this->thread; }
  __device__ float (&quad(int, int column))[4] {
    return *reinterpret_cast<float (*)[4]>(&out[column * 4]);
  }
  __device__ void set_state(int i, State state) { folded[i] = state; }

  // Block n, part by part as they come.
  __device__ void begin_scores(int n) {
    const int stage = this->stage_of(n), parity = this->parity_of(n);
    uint32_t half = this->group;
    keep_in_place(half);  // else the descriptors of all parts are kept in registers
    const int owner = of_warp(static_cast<int>(half));
    const uint64_t rows = rows_descriptor(this->own_queries());
    const uint64_t columns = rows_descriptor(this->part_at(stage, 0));
#pragma unroll
    for (int i = 0; i < kLatentParts; ++i) {
      const int part = this->part_of(owner, i);
      wait_phase(this->full(stage, part), parity);
      begin_products();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int bytes = part * this->kPartBytes + step * 32;
        multiply_rows<kDType>(scores, descriptor_at(rows, bytes), descriptor_at(columns, bytes),
                              i + step > 0);
      }
    }
    commit_products();
  }

  // This group's half of block n.
  __device__ void begin_values(int n, const Weights& weights) {
    char* values = this->part_at(this->stage_of(n), this->group * this->kGroupParts);
    const uint64_t columns = columns_descriptor(values, this->kPartBytes);
#pragma unroll
    for (int i = 0; i < kLatentTokens / 16; ++i) {
      multiply_columns<kDType>(out, weights[0][i], descriptor_at(columns, i * 16 * kRowBytes));
    }
    commit_products();
  }

  __device__ void clear_unseen(const LatentWork& work, int block, int n) const {
    char* values = this->part_at(this->stage_of(n), this->group * this->kGroupParts);
    this->template clear_unseen_values<kOut>(work, block, values);
  }

  __device__ void end_values(int n) {
    wait_products<0>(out);
    this->release(this->free(this->stage_of(n), this->group));
  }

  // To the thread of the other group that has the same rows.
  __device__ void give(const Weights& weights) const {
    uint4* to = this->given_weights() + this->thread;
#pragma unroll
    for (int i = 0; i < kLatentTokens / 16; ++i) {
      const uint32_t (&four)[4] = weights[0][i];
      to[i * kGroupThreads] = make_uint4(four[0], four[1], four[2], four[3]);
    }
    this->given_maxima()[this->thread] = make_float4(max[0], max[1], 0.0f, 0.0f);
    arrive_named(this->kGiven + this->group, kThreads);
  }

  // The other group's weights of block n; max, sums and outputs become relative to its maxima.
  __device__ void take(Weights& weights, int n) {
    sync_named(this->kGiven + 1 - this->group, kThreads);
    const uint4* from = this->given_weights() + this->thread;
#pragma unroll
    for (int i = 0; i < kLatentTokens / 16; ++i) {
      const uint4 four = from[i * kGroupThreads];
      weights[0][i][0] = four.x, weights[0][i][1] = four.y;
      weights[0][i][2] = four.z, weights[0][i][3] = four.w;
    }
    const float4 maxima = this->given_maxima()[this->thread];
    const float highest[2] = {maxima.x, maxima.y};
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shrink[i] =
          exp2_fast(max[i] * unit() - (highest[i] == -INFINITY ? 0.0f : highest[i] * unit()));
      max[i] = highest[i];
      sum[i] *= shrink[i];
    }
    this->shrink_out(shrink);
    // The other group has seen that they are there; what was copied is seen by who waits himself.
    for (int i = 0; i < this->kGroupParts; ++i) {
      const int stage = this->stage_of(n);
      wait_phase(this->full(stage, this->group * this->kGroupParts + i), this->parity_of(n));
    }
  }

  // Block n, the group's own. kAfter: the block before it is of the same split, and the other's.
  template <bool kAfter>
  __device__ void attend_own(const LatentWork& work, int block, int n) {
    begin_scores(n);
    Weights given;
    if constexpr (kAfter) {
      take(given, n - 1);
      clear_unseen(work, block - 1, n - 1);
      begin_products();
      begin_values(n - 1, given);
      wait_products<1>(scores);
    } else {
      wait_products<0>(scores);
    }
    this->release(this->free(this->stage_of(n), kLatentGroups));
    float shrink[2];
    this->weigh(block, shrink);
    Weights weights;
    this->round_weights(weights);
    give(weights);
    if constexpr (kAfter) end_values(n - 1);
    this->shrink_out(shrink);
    clear_unseen(work, block, n);
    begin_products();
    begin_values(n, weights);
    end_values(n);
  }

  __device__ void attend_others(const LatentWork& work, int block, int n) {
    Weights given;
    take(given, n);
    clear_unseen(work, block, n);
    begin_products();
    begin_values(n, given);
    end_values(n);
  }

  // Blocks of one split; n more are taken.
  __device__ void attend_split(const LatentWork& work, int block, int end, int& n) {
    block = of_warp(block), end = of_warp(end), n = of_warp(n);
    const int last = end - 1;
    if (this->owner_of(block) == this->group) {
      attend_own<false>(work, block++, n++);
    }
    for (++block, ++n; block < end; block += 2, n += 2) attend_own<true>(work, block, n);
    // Here `block` is end or end + 1, and n counts with it.
    n -= block - end;
    if (this->owner_of(last) != this->group) attend_others(work, last, n - 1);
    end_split();
  }

  // Sums become those of the whole row: over its lanes, and both groups.
  __device__ void end_split() {
    this->sum_lanes();
    this->sync_both();
    float4* maxima = this->given_maxima();
    auto* sums = reinterpret_cast<float2*>(maxima);
    sums[thread_of_both()] = {sum[0], sum[1]};
    this->sync_both();
    const float2 other = sums[(1 - this->group) * kGroupThreads + this->thread];
    sum[0] += other.x;
    sum[1] += other.y;
    this->sync_both();
  }

  __device__ void store_split(const LatentWork& work) const {
    const Args& all = this->args.all;
    const int num_kv_heads = p.kv.layout.num_kv_heads, head_dim_v = p.kv.layout.head_dim_v;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.first_row + this->tile_row(i);
      if (row >= work.seq.num_rows * this->heads_each()) continue;
      const int64_t slot =
          work.seq.first_slot + static_cast<int64_t>(row) * work.seq.num_splits + work.split;
      const int64_t at = slot * num_kv_heads + work.kv_head;
      if (this->group == 0 && lane() % 4 == 0) all.states[at] = this->state(i);
      float* to = all.outs + at * head_dim_v;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int dim = this->dims_begin() + j * 8 + lane() % 4 * 2;
        if (dim < head_dim_v) {
          *reinterpret_cast<float2*>(to + dim) = {out[j * 4 + i * 2], out[j * 4 + i * 2 + 1]};
        }
      }
    }
  }

  __device__ void fold_split(bool any) {
    Running<LatentRows> running(this->args.all, thread_of_both());
    running.any = any;
    running.take(*this);
  }

  __device__ void attend_item(const LatentWork& work, int& n) {
    this->template copy_queries<kLatentParts * 64, kThreads, 1>(work, thread_of_both());
    wait_copies<0>();
    publish_shared();
    this->sync_both();
    this->place(work);
    constexpr int kSplitBlocks = kLatentSplitTokens / kLatentTokens;
    bool any = false;  // splits before this one
    for (int block = work.first_block; block < work.end_block;) {
      const int end = std::min(work.end_block, (block / kSplitBlocks + 1) * kSplitBlocks);
      attend_split(work, block, end, n);
      const bool last = end == work.end_block;
      if (!last || any) fold_split(any);
      if (!last) this->clear();
      any = true;
      block = end;
    }
    if (work.split >= 0) {
      store_split(work);
      return;
    }
    folded[0] = this->state(0), folded[1] = this->state(1);
    if (work.end_block > (work.first_block / kSplitBlocks + 1) * kSplitBlocks) {
      Running<LatentRows>(this->args.all, thread_of_both()).give(*this);
    }
    this->store(work, folded, this->group == 0);
  }

  __device__ void attend_all() {
    for (int turn = 0, n = 0;; ++turn) {
      wait_phase(this->item_full(turn), turn / this->kItems % 2);
      const LatentWork& work = *this->item_at(turn);
      if (work.ended) return;
      attend_item(work, n);
      __syncwarp();  // all lanes have read what there is of the item
      this->release(this->item_free(turn));
    }
  }
};

}  // namespace kvlink::cuda
