#pragma once

#include <cstdint>

#include "kvlink/base/readiness.hpp"
#include "kvlink/layout/kv_layout.hpp"

namespace kvlink {

// Attention of ragged new tokens over paged KV. Sequence b owns query rows
// [q_indptr[b], q_indptr[b+1]) and they are the last of its seq_lens[b] tokens.
struct PagedAttentionParams {
  const void* q = nullptr;  // [num_tokens, num_q_heads, head_dim], dim contiguous
  void* out = nullptr;      // [num_tokens, num_q_heads, head_dim_v], dim contiguous, dtype of q
  float* lse = nullptr;     // [num_tokens, num_q_heads] contiguous, natural log; nullable
  DType q_dtype = DType::kFloat32;                // float32, float16 or bfloat16
  int64_t q_stride_token = 0, q_stride_head = 0;  // elements
  int64_t out_stride_token = 0, out_stride_head = 0;

  const int32_t* q_indptr = nullptr;     // [num_seqs + 1]; null: one query row per sequence
  const int32_t* seq_lens = nullptr;     // [num_seqs], new tokens included
  const int32_t* page_table = nullptr;   // [num_seqs, num_entries], or CSR: [num_entries]
  const int32_t* page_indptr = nullptr;  // [num_seqs + 1]; non-null: page_table is CSR
  int64_t num_entries = 0;               // of a row of the page table; CSR: of all of it
  int64_t page_table_stride = 0;         // elements from row to row when dense
  int64_t num_seqs = 0;
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;  // a multiple of the layer's num_kv_heads
  LayerView kv;

  // What a page table entry's page must still be; both or neither.
  const uint32_t* generations = nullptr;           // [num_pages], as they are now
  const uint32_t* expected_generations = nullptr;  // as page_table
  int64_t expected_stride = 0;                     // as page_table_stride

  // Position of each query row in its sequence, not falling within one; null: the last positions.
  const int32_t* q_positions = nullptr;  // [num_tokens]

  // Bit j % 8 of byte j / 8 of a row: the row sees position mask_starts[seq] + j of its sequence.
  // Positions before that are not masked.
  const uint8_t* mask = nullptr;         // [num_tokens, mask_bytes]; nullable
  const int32_t* mask_starts = nullptr;  // [num_seqs]; null: the position of the first query row
  int64_t mask_stride = 0;               // bytes
  int64_t mask_bytes = 0;

  float scale = 1.0f;
  bool causal = true;
  int64_t window = 0;                   // last `window` positions, itself included; 0: all
  float softcap = 0.0f;                 // 0: none
  const float* sinks = nullptr;         // [num_q_heads]; nullable
  const float* alibi_slopes = nullptr;  // [num_q_heads]; nullable

  ReadyWait ready;  // before anything of kv is read
};

}  // namespace kvlink
