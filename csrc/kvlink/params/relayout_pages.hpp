#pragma once

#include <cstdint>

#include "kvlink/layout/kv_layout.hpp"

namespace kvlink {

// A run of tokens in a pool: token t of the run is slot (first_slot + t) % page_size of page
// pages[(first_slot + t) / page_size].
struct TokenRun {
  const int32_t* pages = nullptr;
  int64_t num_pages = 0;   // entries readable at pages
  int64_t first_slot = 0;  // may exceed page_size
};

// Copies num_tokens tokens x num_heads heads x num_layers layers from one pool to another, whatever
// their layouts, converting, quantising and digesting on the way.
struct RelayoutParams {
  const LayerView* src_layers = nullptr;  // [num_layers]
  const LayerView* dst_layers = nullptr;  // [num_layers]
  const int32_t* model_layers =
      nullptr;  // [num_layers] layer number in the model; enters the digest
  int32_t num_layers = 0;
  int32_t num_heads = 0;               // heads moved; heads are contiguous on both sides
  int32_t src_head = 0, dst_head = 0;  // first of them in each pool
  int32_t model_head = 0;              // first of them in the model; enters the digest
  TokenRun src, dst;
  int64_t num_tokens = 0;
  int64_t token_position = 0;  // of the first token in its request; enters the digest
  bool with_digest = false;
  // Bytes of the whole move if this is a part of one: they tell how to store, never what.
  int64_t whole_bytes = 0;
};

// The same coordinates over one pool, read only.
struct DigestParams {
  const LayerView* layers = nullptr;      // [num_layers]
  const int32_t* model_layers = nullptr;  // [num_layers]
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t head = 0;
  int32_t model_head = 0;
  TokenRun run;
  int64_t num_tokens = 0;
  int64_t token_position = 0;
};

// What was moved. A row is one head of one token in one plane (K or V) of one layer.
struct RelayoutResult {
  uint64_t rows = 0;
  uint64_t digest = 0;  // wrapping sum of row digests, so parts add up in any order; 0 if not asked
};

}  // namespace kvlink
