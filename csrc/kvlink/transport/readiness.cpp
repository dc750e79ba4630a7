#include "kvlink/transport/readiness.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

#include "kvlink/base/check.hpp"
#include "kvlink/transport/control.hpp"

namespace kvlink::transport {

namespace {

// Why a slot's word says that the transfer will not arrive.
const char* explain(uint64_t word) {
  switch (Word::unpack(word).status) {
    case Status::kCancelled:
      return "it was cancelled";
    case Status::kRevoked:
      return "its pages were taken back";
    case Status::kExpired:
      return "its deadline passed";
    case Status::kPeerLost:
      return "the peer is lost";
    case Status::kDigestMismatch:
      return "other bytes than were sent";
    case Status::kGenerationMismatch:
      return "a page was reused meanwhile";
    case Status::kRowCountMismatch:
      return "more rows than were granted";
    case Status::kMoveFailed:
      return "the pages could not be moved";
    default:
      return "it has ended";
  }
}

// Alive in every phase, as long as the generation is that of the key and no failure is told.
static_assert(static_cast<int>(Status::kOk) == 0 && static_cast<int>(Status::kPending) == 1);
constexpr uint64_t kAliveMask = ~uint64_t{0x1ff};

}  // namespace

Readiness Control::readiness(SlotKey key, uint32_t layer) const {
  const Slot& slot = this->slot(key.slot);
  KVLINK_CHECK(layer < kMaxLayers, "layer: expected below ", kMaxLayers, "; got ", layer);
  return {.landed = &slot.layer_rows[layer],
          .target = slot.rows_per_layer,
          .state = &slot.word,
          .alive_mask = kAliveMask,
          .alive = Word{key.generation, Status::kOk, Phase::kFree}.pack(),
          .changes = &slot.changes,
          .why = &explain};
}

void Landing::add(int32_t part, uint64_t rows) {
  rows_[part].fetch_add(rows);
  notify();
}

void Landing::end(Status status) {
  state_.store(Word{0, status, Phase::kClosed}.pack());
  notify();
}

Readiness Landing::readiness(int32_t part, uint64_t target) const {
  return {.landed = &rows_[part],
          .target = target,
          .state = &state_,
          .alive_mask = kAliveMask,
          .alive = 0,
          .changes = &changes_,
          .why = &explain};
}

void Landing::notify() {
  changes_.fetch_add(1);
  syscall(SYS_futex, &changes_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace kvlink::transport
