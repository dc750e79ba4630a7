// A tile's rows: scores, weights and sums of the two warp groups that compute. The whole is
// described in prefill_ring.cuh.
#pragma once

#include "kvlink/cuda/group_rows.cuh"
#include "kvlink/cuda/prefill_ring.cuh"

namespace kvlink::cuda {

// kGeneral: with softcap, ALiBi or a scale that is not positive. kParts: see WeightParts.
template <DType kDType, int kDim, int kDimV, bool kGeneral, int kParts>
struct PrefillRows : GroupRows<PrefillRing<kDim, kDimV>, kDType, PrefillRing<kDim, kDimV>::kTokens,
                               kDimV, kGeneral> {
  using Ring = PrefillRing<kDim, kDimV>;
  using Rows = GroupRows<Ring, kDType, Ring::kTokens, kDimV, kGeneral>;
  using Ring::args, Ring::group, Ring::p, Ring::sync_group, Ring::thread;
  using Ring::keys_free, Ring::keys_full, Ring::values_free, Ring::values_full;
  using Ring::kTokens;
  using Ring::queries, Ring::keys, Ring::values, Ring::stage_of, Ring::parity_of, Ring::find_work;
  using Rows::out, Rows::release, Rows::scores, Rows::shrink_out, Rows::weigh;
  // Products beside the softmax, and queries of the next tile beside this one's last products: as
  // far as registers last.
  static constexpr bool kOverlaps = kParts == 1 && kDimV <= 128;
  static constexpr bool kAhead = !kGeneral && kDimV <= 128;

  using Rows::Rows;

  uint32_t weights[kParts][kTokens / 16][4];

  __device__ void copy_queries(const TileWork& work) const {
    Rows::template copy_queries<kDim, kGroupThreads, kAhead ? 4 : 1>(work, thread);
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
    this->round_weights(weights);
    wait_phase(values_full(stage_of(n)), parity_of(n));
  }

  // Block n: scores; block n - 1, one position further: values.
  __device__ void attend_next(const TileWork& work, int block, int n) {
    const int before = stage_of(n - 1), stage = stage_of(n);
    wait_phase(keys_full(stage), parity_of(n));
    this->template clear_unseen_values<kDimV>(work, block + 1, values(before));
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
    this->round_weights(weights);
  }

  __device__ void last_values(const TileWork& work, int block, int n) {
    this->template clear_unseen_values<kDimV>(work, block, values(stage_of(n)));
    begin_products();
    begin_values(stage_of(n));
    wait_products<0>(out);
    release(values_free(stage_of(n)));
  }

  // Every block that the tile sees, and n more blocks taken; queries are there.
  __device__ void attend_tile(const TileWork& work, int& n) {
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
    TileWork work;
    int n = 0;  // blocks taken
    bool more = find_work(0, work);
    if (kAhead && more) copy_queries(work);
    for (int round = 1; more; ++round) {
      TileWork next;
      if constexpr (kAhead) {
        more = find_work(round, next);
      } else {
        copy_queries(work);
      }
      this->place(work);
      wait_copies<0>();
      publish_shared();
      sync_group();
      attend_tile(work, n);
      sync_group();  // everybody is done with the queries
      if (kAhead && more) copy_queries(next);
      if (work.end_block > work.first_block) last_values(work, work.first_block, n++);
      this->sum_lanes();
      const State states[2] = {this->state(0), this->state(1)};
      this->store(work, states, true);
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
