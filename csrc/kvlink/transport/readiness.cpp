// A layer of a grant as operators wait for it.
#include "kvlink/base/readiness.hpp"

#include "kvlink/base/check.hpp"
#include "kvlink/transport/control.hpp"

namespace kvlink::transport {

namespace {

// Why a slot's word says that the transfer will not arrive.
const char* explain(uint64_t word) {
  switch (Word::unpack(word).status) {
    case Status::kCancelled:
      return "the sender gave it up";
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
      return "the sender could not move it";
    default:
      return "it has ended";
  }
}

}  // namespace

Readiness Control::readiness(SlotKey key, uint32_t layer) const {
  const Slot& slot = this->slot(key.slot);
  KVLINK_CHECK(layer < kMaxLayers, "layer: expected below ", kMaxLayers, "; got ", layer);
  // Alive in every phase, as long as the generation is that of the key and no failure is told.
  static_assert(static_cast<int>(Status::kOk) == 0 && static_cast<int>(Status::kPending) == 1);
  return {.landed = &slot.layer_rows[layer],
          .target = slot.rows_per_layer,
          .state = &slot.word,
          .alive_mask = ~uint64_t{0x1ff},
          .alive = Word{key.generation, Status::kOk, Phase::kFree}.pack(),
          .changes = &slot.changes,
          .why = &explain};
}

}  // namespace kvlink::transport
