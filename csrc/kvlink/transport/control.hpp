// The control segment of an endpoint: its slots and page lists, in memory that peers on this host
// may map. For peers elsewhere the owner's process enters on their behalf, in the same way.
//
// Who may enter the pages is decided here, without a message:
//   peer:  writers |= bit; read word; not open, another generation, past the deadline? leave.
//   owner: word = closed;  read writers; not zero? quarantine the pages until it is.
// All four are sequentially consistent, so at least one of the two sees the other (Dekker).
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "kvlink/base/readiness.hpp"
#include "kvlink/base/segment.hpp"
#include "kvlink/transport/transport.hpp"

namespace kvlink::transport {

inline constexpr uint32_t kMaxLayers = 256;  // stored layers of a pool
inline constexpr uint32_t kMaxLinks = 64;    // one bit each

enum class Phase : uint8_t {
  kFree = 0,
  kOpen = 1,       // peers may enter
  kVerifying = 2,  // a grant whose rows are complete: nobody enters
  kAdopted = 3,    // an offer whose pages a peer uses in place
  kClosed = 4,     // ended; the status tells how
};

// generation, status and phase change together.
struct Word {
  uint64_t generation = 0;  // 48 bits
  Status status = Status::kPending;
  Phase phase = Phase::kFree;

  uint64_t pack() const {
    return generation << 16 | uint64_t{static_cast<uint8_t>(status)} << 8 |
           static_cast<uint8_t>(phase);
  }
  static Word unpack(uint64_t bits) {
    return {bits >> 16, static_cast<Status>(bits >> 8 & 0xff), static_cast<Phase>(bits & 0xff)};
  }
};

struct alignas(64) Slot {
  std::atomic<uint64_t> word;
  std::atomic<uint64_t> writers;     // links that are inside the pages now
  std::atomic<uint64_t> unfinished;  // links that began and have not finished
  std::atomic<int64_t> deadline_ns;
  std::atomic<uint32_t> changes;  // futex: bumped after every change
  std::atomic<uint32_t> lessee;   // offers: 1 + bit of the link that adopted, or 0
  std::atomic<uint32_t> pulls_left;
  std::atomic<uint32_t> with_digest;
  std::atomic<uint32_t> torn;  // a writer died inside: nobody knows what it wrote

  alignas(64) std::atomic<uint64_t> rows;

  alignas(64) SlotKind kind;
  uint32_t num_layers;
  uint64_t transfer_id[2];
  uint64_t rows_per_layer;
  uint64_t first_page;  // in the page list
  uint32_t num_pages;

  // A writer adds a chunk's digest before its rows: complete rows have complete digests.
  alignas(64) std::atomic<uint64_t> layer_digest[kMaxLayers];
  alignas(64) std::atomic<uint64_t> layer_rows[kMaxLayers];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

// The owner's own pages of one slot: what verify reads, and what a path's receiving side writes.
struct OwnPages {
  std::vector<LayerView> layers;      // [stored layers]
  std::vector<int32_t> model_layers;  // [stored layers] the model layer each travels as
  int32_t model_head = 0;             // first of the pool's heads, all of which are covered
  std::vector<int32_t> pages;
  int64_t num_tokens = 0;
  const uint32_t* generations = nullptr;  // [pages of the pool] now
  std::vector<uint32_t> granted;          // [pages] as they were at the grant
  std::shared_ptr<void> keep_alive;

  // Layers whose digest was found right, each once, as they came; and the time that took.
  std::mutex mutex;
  std::vector<bool> digested;
  std::atomic<int64_t> verify_ns{0};
};

// A mapped control segment, one's own or a peer's.
class Control {
 public:
  static std::shared_ptr<Control> create(uint32_t num_slots, uint64_t num_page_entries);
  // Throws InvalidArgument when the segment is not what its header says.
  static std::shared_ptr<Control> attach(int fd, uint64_t num_bytes);

  uint32_t num_slots() const { return num_slots_; }
  uint64_t num_page_entries() const { return num_page_entries_; }
  const Segment& segment() const { return segment_; }
  Slot& slot(uint32_t idx) const;  // throws InvalidArgument
  int32_t* page_list() const { return page_list_; }
  // Entries of it; throws InvalidArgument.
  std::span<const int32_t> pages(uint64_t first, uint64_t count) const;

  // --- the owner ---
  // The slot must be free or closed with nobody inside. `first_page` is where the page list goes.
  SlotKey open(uint32_t slot, uint64_t first_page, const SlotTerms& terms,
               std::shared_ptr<OwnPages> own);
  // The pages of an open slot; null when it serves another transfer, or was forgotten.
  std::shared_ptr<OwnPages> own(SlotKey key) const;
  // Drops what was kept for own(): the pages may go.
  void forget(SlotKey key);
  // Called in this process, on any thread, when it has closed a slot.
  void set_on_closed(std::function<void(SlotKey, Status)> on_closed);
  // Open (or adopted) -> closed; false when it had ended before.
  bool close(SlotKey key, Status status);
  // Moves the deadline of an open slot; false when it had ended.
  bool extend(SlotKey key, int64_t deadline_ns);
  // As close, when the deadline has passed.
  bool expire(SlotKey key, int64_t now);
  // Closed, and no peer inside: the pages are the owner's alone.
  bool quiet(SlotKey key) const;
  // Forgets a dead link: its bits and leases, in every slot. Grants that it was inside of, or whose
  // part it left incomplete, end as kPeerLost.
  void drop_link(uint32_t bit);
  // Grant: all rows of a stored layer arrived.
  Status wait_layer(SlotKey key, uint32_t layer, int64_t deadline_ns) const;
  // The same, for operators; valid as long as the segment is mapped.
  Readiness readiness(SlotKey key, uint32_t layer) const;
  // Grant: until all rows arrived, comparing the digests of layers as they complete; then shuts
  // writers out, compares what is left (count, digests, page generations last) and closes the slot
  // with the result. kPending at the deadline: the slot is open.
  //
  // A layer that was digested early is still covered: whatever is written into it later is counted
  // (one row too many) or torn.
  Status arrive(SlotKey key, const Executor& executor, int64_t deadline_ns);

  // --- both ---
  // kPending while open; kStale when the slot serves another transfer.
  Status status(SlotKey key) const;
  // Until it ended or deadline_ns; kPending then.
  Status wait_closed(SlotKey key, int64_t deadline_ns) const;

  // --- a peer ---
  Status enter(SlotKey key, uint32_t bit);  // pin; kOk or why not
  // What enter would say; for whoever holds the pin already.
  Status may_enter(SlotKey key) const;
  void leave(SlotKey key, uint32_t bit);  // unpin
  // Between enter and leave: rows that were written, and their digest. Wakes who waits for them.
  void add_rows(SlotKey key, uint32_t layer, const RelayoutResult& moved);
  Status begin(SlotKey key, uint32_t bit);  // marks this link unfinished; kBusy if it is
  void finish(SlotKey key, uint32_t bit);
  Status adopt(SlotKey key, uint32_t bit);  // takes an offer in place
  // Undoes adopt, before anything was read: the offer is open again; false when it had ended.
  bool unadopt(SlotKey key, uint32_t bit);
  bool release(SlotKey key, uint32_t bit);  // ends the lease; false when it had ended before
  Status consume(SlotKey key);              // one pull is done

  Control(Segment segment, uint32_t num_slots, uint64_t num_page_entries);

 private:
  bool owns(SlotKey key, Word* word) const;
  template <typename Done>
  Status wait(SlotKey key, int64_t deadline_ns, Done done) const;
  bool digest_layers(SlotKey key, const Executor& executor, OwnPages& own);
  Status commit(SlotKey key, const Executor& executor, OwnPages& own, int64_t deadline_ns);
  void tell_closed(SlotKey key, Status status);

  Segment segment_;
  uint32_t num_slots_;
  uint64_t num_page_entries_;
  Slot* slots_;
  int32_t* page_list_;

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<OwnPages>> own_;  // [slots] at the owner
  std::function<void(SlotKey, Status)> on_closed_;
};

// Wakes every waiter of the slot.
void notify(Slot& slot);

}  // namespace kvlink::transport
