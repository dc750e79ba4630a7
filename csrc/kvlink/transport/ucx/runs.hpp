// The runs of bytes that two layouts share: what puts and gets move without packing.
#pragma once

#include "kvlink/params/relayout_pages.hpp"
#include "kvlink/transport/ucx/port.hpp"
#include "kvlink/transport/ucx/terms.hpp"

namespace kvlink::transport::ucx {

// Stored bytes mean the same on both sides, and dims lie side by side.
bool same_bytes(const KVLayout& a, const KVLayout& b);
// Of the shortest run in a whole page of the smaller page size.
int64_t run_bytes(const KVLayout& a, const KVLayout& b, int32_t num_heads);

// The runs of one chunk by their addresses here and there, plane by plane in the order of tokens;
// `push`: the source is here.
std::vector<RemoteRun> cut_runs(const RelayoutParams& params, bool push);
// Where the runs of one chunk are, here and at the peer; `push`: the source is here. `blocks` are
// the peer's, in the order of their numbers. Throws InvalidArgument when one lies outside of them.
std::vector<RemoteRun> find_runs(const RelayoutParams& params, bool push,
                                 const std::vector<RemoteBlock>& blocks,
                                 const std::vector<uint32_t>& block_numbers);

}  // namespace kvlink::transport::ucx
