// What a sequence's work is, from what only the device knows.
#pragma once

#include "kvlink/cuda/attention_args.cuh"

namespace kvlink::cuda {

__device__ inline bool rises(const Args& args, const int32_t* indptr, int seq, int64_t total) {
  const bool good = indptr[seq] >= 0 && indptr[seq] <= indptr[seq + 1] && indptr[seq + 1] <= total;
  if (!good) record_error(args.errors, BadEntry::kIndptr, seq + 1, indptr[seq + 1]);
  return good;
}

// What can be trusted of a sequence, but for its place in the work.
__device__ inline SequencePlan check_sequence(const Args& args, int seq) {
  const PagedAttentionParams& p = args.p;
  SequencePlan plan{};
  int64_t num_entries = p.num_entries;
  plan.first_entry = seq * p.page_table_stride;
  plan.first_expected = seq * p.expected_stride;
  bool good = true;
  if (p.page_indptr) {
    good = rises(args, p.page_indptr, seq, p.num_entries);
    plan.first_entry = plan.first_expected = good ? p.page_indptr[seq] : 0;
    num_entries = good ? p.page_indptr[seq + 1] - plan.first_entry : 0;
  }
  plan.first_row = seq;
  plan.num_rows = 1;
  if (p.q_indptr) {
    const bool rows_good = rises(args, p.q_indptr, seq, p.num_tokens);
    plan.first_row = rows_good ? p.q_indptr[seq] : 0;
    plan.num_rows = rows_good ? p.q_indptr[seq + 1] - plan.first_row : 0;
  }
  const int64_t seq_len = p.seq_lens[seq];
  if (seq_len < 0 || seq_len > num_entries * p.kv.layout.page_size ||
      (seq_len > 0 && !p.q_positions && seq_len < plan.num_rows)) {
    if (good) record_error(args.errors, BadEntry::kSeqLens, seq, seq_len);
    good = false;
  }
  plan.seq_len = good ? static_cast<int>(seq_len) : 0;
  if (p.mask && plan.seq_len > 0 && plan.num_rows > 0) {
    plan.mask_start = p.mask_starts ? p.mask_starts[seq] : plan.seq_len - plan.num_rows;
    if (plan.mask_start < 0 || plan.mask_start > plan.seq_len ||
        plan.seq_len - plan.mask_start > 8 * p.mask_bytes) {
      record_error(args.errors, BadEntry::kMaskStarts, seq, plan.mask_start);
      plan.seq_len = 0;
    }
  }
  return plan;
}

// What a sequence's rows see together, in splits.
__device__ inline void find_splits(const Args& args, SequencePlan* plan) {
  Range range{0, 0};
  if (plan->num_rows > 0 && plan->seq_len > 0) {
    const auto sees = [&](int row) {
      return visible(args.p, position_of(args.p, *plan, row, args.errors), plan->seq_len);
    };
    range = {sees(0).begin, sees(plan->num_rows - 1).end};
  }
  plan->first_split = range.begin / args.split_tokens;
  plan->num_splits =
      range.end > range.begin
          ? (range.end + args.split_tokens - 1) / args.split_tokens - plan->first_split
          : 0;
}

}  // namespace kvlink::cuda
