#pragma once

#include <cuda_runtime.h>

#include <string>

#include "kvlink/cuda/error_record.hpp"
#include "kvlink/params/paged_attention.hpp"

namespace kvlink::cuda {

struct SequencePlan;
struct PrefillTile;

// How many 16-bit parts of each weight enter the second product: one is fast, two are as close as
// float32 sums.
enum class WeightParts : int { kOne = 1, kTwo = 2 };

// Which sequences of a call with q_indptr the kernel takes.
struct PrefillChoice {
  const char* lacks = "";  // why none; null: it takes those of more than `most_rows`
  int most_rows = 0;       // new tokens times query heads of a KV head
  WeightParts parts = WeightParts::kOne;
};

// On the current device, with this build. A sequence's own rows decide, so its bits depend on no
// other one.
PrefillChoice choose_prefill(const PagedAttentionParams& params);

// Whether the call is one on latent pages that latent_attention_sm90 takes, as a whole: the number
// of query heads decides, so a sequence's bits depend on no other one.
bool takes_latent(const PagedAttentionParams& params);

// For tests and measurements: "auto"; "mma.sync", never the kernel; "wgmma", for every row count;
// "wgmma, two parts". Of the process. Throws InvalidArgument.
void set_prefill(const std::string& name);
// What choose_prefill or takes_latent said last in this thread: "wgmma", or "mma.sync: " and why.
std::string last_prefill();

// The tiles of a list (prefill_tiles.cuh).
void paged_attention_sm90(const PagedAttentionParams& params, const SequencePlan* plans,
                          const PrefillTile* tiles, int64_t max_tiles, ErrorRecord* errors,
                          WeightParts parts, cudaStream_t stream);
// Loads the kernel that it would launch.
void load_paged_attention_sm90(const PagedAttentionParams& params, WeightParts parts);

}  // namespace kvlink::cuda
