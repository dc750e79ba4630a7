// The vocabulary of every path: what a transfer is made of, how it can end, and what a path must
// do. docs/transfer_contract.md is the specification.
//
// Two sides meet at a slot. The owner of the pages opens it (a grant: peers write into the pages;
// an offer: peers read from them) and alone decides how it ends. A peer only enters the pages
// between pin and unpin, and a pin fails as soon as the owner has closed the slot.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "kvlink/layout/kv_layout.hpp"
#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::transport {

// How a transfer stands or ended. One class of kvlink.transfer.errors each; numbers go over the
// wire.
enum class Status : uint8_t {
  kOk = 0,                  // arrived: the receiver has verified every byte (offer: consumed)
  kPending = 1,             // none of the others yet
  kCancelled = 2,           // the sender gave up
  kRevoked = 3,             // the owner took the pages back
  kExpired = 4,             // the deadline passed
  kPeerLost = 5,            // the peer died, or closed its link with its part incomplete
  kDigestMismatch = 6,      // the bytes in the pages are not those that were sent
  kGenerationMismatch = 7,  // a page was freed or reused meanwhile
  kRowCountMismatch = 8,    // more rows than the grant covers
  kStale = 9,               // the slot serves another transfer by now
  kMoveFailed = 10,         // the executor refused; a message tells why
  kTimeout = 11,            // of a wait only: the transfer goes on
  kBusy = 12,               // of begin only: this link already writes, or the offer is taken
};

enum class SlotKind : uint32_t { kGrant = 1, kOffer = 2 };

// Names one use of one slot. A slot's generation changes with every use, so a key never means two.
struct SlotKey {
  uint32_t slot = 0;
  uint64_t generation = 0;
};

// What the owner promises when it opens a slot.
struct SlotTerms {
  SlotKind kind = SlotKind::kGrant;
  uint64_t transfer_id[2] = {0, 0};
  int64_t deadline_ns = 0;      // CLOCK_MONOTONIC
  uint32_t num_layers = 0;      // stored layers of the owner's pool
  uint64_t rows_per_layer = 0;  // of each; a grant is complete at num_layers * rows_per_layer
  uint32_t num_pulls = 1;       // offers: transfers after which the pages are free again
  bool with_digest = true;
  const int32_t* pages = nullptr;  // [num_pages], kept where peers can read them
  uint32_t num_pages = 0;
};

// One stored layer that both pools hold.
struct Part {
  int32_t src_layer = 0, dst_layer = 0;  // stored layers
  int32_t model_layer = 0;               // enters the digest
};

// The cut of two pools: contiguous heads of some layers (kvlink/transfer/plan.py makes it).
struct Plan {
  std::vector<Part> parts;
  int32_t num_heads = 0;
  int32_t src_head = 0, dst_head = 0, model_head = 0;
};

// A pool as a transfer sees it.
struct PoolLayers {
  std::vector<LayerView> layers;  // stored layers
};

// The executor, given by whoever links both halves: transports do not know the operators.
struct Executor {
  RelayoutResult (*relayout)(const RelayoutParams&) = nullptr;
  RelayoutResult (*digest)(const DigestParams&) = nullptr;
};

// A part's times, CLOCK_MONOTONIC ns; 0 where it did not happen yet.
struct PartTimes {
  int64_t posted_ns = 0, started_ns = 0, done_ns = 0;
};

struct Progress {
  Status status = Status::kPending;  // of the work on this side; the outcome is the owner's slot
  bool source_reusable = false;      // no byte of the source will be read any more
  int64_t num_moving = 0;            // chunks that this side is at
  uint64_t num_bytes = 0;            // stored at the destination so far
  uint64_t num_rows = 0;
  int64_t moving_ns = 0;  // spent in the executor
  std::vector<PartTimes> parts;
  std::string message;  // why, when the executor refused
};

// One transfer in the hands of the side that moves it. Every path implements this; all calls are
// thread-safe and none of them waits except where it says so.
class Transfer {
 public:
  virtual ~Transfer() = default;
  // Queues the next num_tokens tokens of a part. O(1). Parts come in any order.
  virtual void post(int32_t part, int64_t num_tokens) = 0;
  // Queues the end: everything was posted. Pulls verify and hand back the offer here.
  virtual void finish() = 0;
  // Stops before the next chunk. The other side sees kCancelled.
  virtual void cancel() = 0;
  // Both completions, waited for until deadline_ns at the latest; kTimeout when it passed.
  virtual bool wait_source_reusable(int64_t deadline_ns) = 0;
  virtual Status wait_arrived(int64_t deadline_ns) = 0;
  virtual Progress progress() const = 0;
};

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace kvlink::transport
