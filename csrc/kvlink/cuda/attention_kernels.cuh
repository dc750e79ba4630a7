// The kernel of calls with q_indptr: tiles of rows over positions.
#pragma once

#include "kvlink/cuda/attention_tile.cuh"

namespace kvlink::cuda {

// Calls f(i, row, head, token) for this lane's real rows.
template <typename Tile, typename F>
__device__ void for_rows(const Tile& tile, const F& f) {
#pragma unroll
  for (int i = 0; i < Tile::kLaneRows; ++i) {
    const int row = tile.first_row + tile.tile_row(i);
    if (row < tile.num_rows()) f(i, row);
  }
}

// What a tile has folded of the splits before the one it is at: in global memory, since it is
// rarely looked at and registers are short. [kLaneRows / 2 of states, then of out][kThreads].
template <typename Tile>
struct Running {
  static constexpr int kStates = Tile::kLaneRows / 2;
  static constexpr int kVectors = kStates * (1 + Tile::kColumns);  // of a thread
  float4* kept;
  bool any = false;

  // thread: of the kThreads that have the tile.
  __device__ Running(const Args& args, int thread)
      : kept(args.running +
             (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) *
                 (kVectors * Tile::kThreads) +
             thread) {}

  // Takes the split that `tile` has just ended.
  __device__ void take(Tile& tile) {
#pragma unroll
    for (int m = 0; m < kStates; ++m) {
      float4& pair = kept[m * Tile::kThreads];
      const float4 before = any ? pair : make_float4(-INFINITY, 0.0f, -INFINITY, 0.0f);
      State states[2] = {{before.x, before.y}, {before.z, before.w}};
      const Fold by[2] = {fold(states[0], tile.state(2 * m)),
                          fold(states[1], tile.state(2 * m + 1))};
      pair = make_float4(states[0].max, states[0].sum, states[1].max, states[1].sum);
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        float4& four = kept[(kStates + m * Tile::kColumns + j) * Tile::kThreads];
        const float4 all = any ? four : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float (&part)[4] = tile.quad(m, j);
        four = make_float4(fold(all.x, part[0], by[0]), fold(all.y, part[1], by[0]),
                           fold(all.z, part[2], by[1]), fold(all.w, part[3], by[1]));
      }
    }
    any = true;
  }

  // Makes the tile what was folded.
  __device__ void give(Tile& tile) const {
#pragma unroll
    for (int m = 0; m < kStates; ++m) {
      const float4 states = kept[m * Tile::kThreads];
      tile.set_state(2 * m, {states.x, states.y});
      tile.set_state(2 * m + 1, {states.z, states.w});
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        const float4 four = kept[(kStates + m * Tile::kColumns + j) * Tile::kThreads];
        float (&all)[4] = tile.quad(m, j);
        all[0] = four.x, all[1] = four.y, all[2] = four.z, all[3] = four.w;
      }
    }
  }
};

template <typename Tile>
__device__ void store_split(const Args& args, const Tile& tile, int split) {
  const int num_kv_heads = args.p.kv.layout.num_kv_heads, head_dim_v = args.p.kv.layout.head_dim_v;
  for_rows(tile, [&](int i, int row) {
    const int64_t slot =
        tile.seq.first_slot + static_cast<int64_t>(row) * tile.seq.num_splits + split;
    const int64_t at = slot * num_kv_heads + tile.kv_head;
    if (tile.owns_state()) args.states[at] = {tile.max[i], tile.sum[i]};
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int dim = tile.dim_of(j, half);
        if (dim < head_dim_v)
          args.outs[at * head_dim_v + dim] = tile.out[i / 2][j][i % 2 * 2 + half];
      }
    }
  });
}

template <typename Tile>
__device__ void store_results(const Args& args, const Tile& tile) {
  const PagedAttentionParams& p = args.p;
  for_rows(tile, [&](int i, int row) {
    const int head = tile.head_of(row);
    const int64_t token = tile.seq.first_row + tile.token_of(row);
    const Denominator by = denominator(p, head, {tile.max[i], tile.sum[i]});
    if (p.lse && tile.owns_state()) p.lse[token * p.num_q_heads + head] = by.lse;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const float a = tile.out[i / 2][j][i % 2 * 2] * by.factor;
      const float b = tile.out[i / 2][j][i % 2 * 2 + 1] * by.factor;
      const int dim = tile.dim_of(j, 0);
      if (Tile::Stored::kBytes) {
        if (dim < p.kv.layout.head_dim_v) store_out(p, token, head, dim, a);
        if (tile.dim_of(j, 1) < p.kv.layout.head_dim_v) store_out(p, token, head, dim + 4, b);
      } else if (dim < p.kv.layout.head_dim_v) {
        store_pair(p, token, head, dim, a, b);
      }
    }
  });
}

// Grid: KV heads in x, items (tiles of rows, or splits of such) in y, the last ones first: they are
// the longest of a causal sequence.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    extend(const __grid_constant__ Args args) {
  const int num_items = args.plans[args.num_seqs].first_item;
  for (int turn = static_cast<int>(blockIdx.y); turn < num_items;
       turn += static_cast<int>(gridDim.y)) {
    const int item = num_items - 1 - turn;
    const SequencePlan plan = args.plans[find_sequence(args, item)];
    const int local = item - plan.first_item;
    Tile tile(args, plan, static_cast<int>(blockIdx.x), local / plan.num_splits * Tile::kRows);
    if (plan.num_splits > 1) {
      const int split = local % plan.num_splits,
                first = (plan.first_split + split) * Tile::kSplitTokens;
      tile.place(Tile::kRows, first, first + Tile::kSplitTokens);
      attend(tile, [] {});
      store_split(args, tile, split);
      continue;
    }
    tile.place(Tile::kRows, 0, plan.seq_len);
    Running<Tile> running(args, static_cast<int>(threadIdx.x));
    attend(tile, [&] {
      tile.finish_split();
      running.take(tile);
      tile.clear();
    });
    if (running.any) {
      running.take(tile);
      running.give(tile);
    }
    store_results(args, tile);
  }
}

}  // namespace kvlink::cuda
