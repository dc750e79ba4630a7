// How the work of a call is divided. A plan decides who computes what, never what is computed: with
// any plan, or none, a row's bits are the same.
#pragma once

#include <cstdint>
#include <vector>

#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cpu {

// One sequence of a call.
struct SequenceView {
  const int32_t* pages;
  const uint32_t* expected_generations;  // nullable
  int64_t num_pages;                     // entries readable at pages
  int64_t seq_len;
  int64_t first_row;  // of q
  int64_t num_rows;
};
SequenceView sequence_at(const PagedAttentionParams& params, int64_t seq);

// Throws InvalidArgument unless q_indptr, page_indptr and seq_lens describe a batch.
void check_batch(const PagedAttentionParams& params);

// Leading positions, in splits, at which the page tables of sequences name the same pages.
int64_t num_shared_splits(const PagedAttentionParams& params, const SequenceView& a,
                          const SequenceView& b);

class AttentionPlan {
 public:
  // For calls with this batch, layout and number of query heads, whose sequences grow up to
  // max_seq_lens [num_seqs] (null: not at all). Balanced for the params' window, causal and
  // threads; right for any. Of the params, q, out and what lies in the pages are not looked at.
  AttentionPlan(const PagedAttentionParams& params, const int32_t* max_seq_lens);

  // Throws InvalidArgument, naming what differs, when the plan was not made for such a call.
  void check(const PagedAttentionParams& params) const;

  // A tile of query rows: of one sequence, or of a group that shares leading pages.
  struct Unit {
    int32_t seq;    // whose pages are read
    int32_t group;  // -1: none
    bool shared;    // attends what the group shares, the others what comes after it
    int32_t first_token, num_tokens;  // rows of q, or of the group's tokens where shared
    int32_t group_token;              // of first_token among the group's
    int32_t first_kv_head = 0, num_kv_heads = 0;
    int32_t num_parts = 1;     // tasks that its splits are divided among
    int32_t first_state = -1;  // in the workspace, one a part; -1: finished by its only task
  };
  struct Task {
    int32_t unit, part;
  };
  // Sequences that share leading pages.
  struct Group {
    std::vector<int32_t> seqs;
    std::vector<int32_t> rows;                            // of q, sequence by sequence
    int64_t num_splits;                                   // shared by all of them
    int32_t first_unit, tile_tokens, heads, head_chunks;  // its units: [chunk][head chunk]
  };

  std::vector<Unit> units;
  std::vector<Group> groups;
  std::vector<Task> tasks;         // in any order; large ones first
  std::vector<int32_t> to_fold;    // shared units of several parts, after the tasks
  std::vector<int32_t> to_finish;  // units that no task finishes, after these
  int64_t num_states = 0;
  int64_t max_rows = 0;  // of a unit

 private:
  void find_groups(const PagedAttentionParams& params);
  void add_units(const PagedAttentionParams& params, int threads);
  void add_tasks(const PagedAttentionParams& params, int threads);
  int64_t estimated_splits(const PagedAttentionParams& params, const Unit& unit) const;

  std::vector<int32_t> q_indptr_;  // empty: one row a sequence
  std::vector<int32_t> max_seq_lens_;
  int64_t num_tokens_;
  int32_t num_q_heads_, num_kv_heads_, head_dim_, head_dim_v_, page_size_;
};

// Floats of a state of that many rows.
int64_t num_state_floats(int64_t num_rows, int64_t out_stride);

}  // namespace kvlink::cpu
