// What links say to each other in active messages: one header for all of them, and a payload after
// some. docs/transfer_contract.md has the protocol.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <string>

#include "kvlink/transport/transport.hpp"

namespace kvlink::transport::ucx {

static_assert(std::endian::native == std::endian::little, "messages are little-endian");

inline constexpr uint32_t kProtocol = 1;

enum class Type : uint32_t {
  // The peer that moves, to the owner of the pages.
  kBegin = 1,    // takes the slot; pulls: payload = Target
  kChunk = 2,    // push: payload = rows in the destination's form, dense
  kPull = 3,     // asks for a chunk
  kEnter = 4,    // pins the pages for puts and gets
  kLeave = 5,    // unpins; push: rows and digest of what was put, if status is kOk
  kFinish = 6,   // this transfer touches nothing any more
  kCancel = 7,   // it gave up: a grant ends with `status`
  kConsume = 8,  // a pull was verified
  kAsk = 9,      // how does the slot stand?
  kLanded = 10,  // a pulled chunk was taken from the owner's buffer
  // The owner, to the peer that moves; `transfer` and `seq` are those of the question.
  kBegun = 33,    // payload = Terms
  kDone = 34,     // of kChunk, kPull that failed, kLeave, kConsume: with `status`
  kPulled = 35,   // payload as of kChunk
  kEntered = 36,  // pull: with rows and digest of what lies there
  kOutcome = 37,  // the slot ended with `status`
  // Either side, once: can the other read a buffer of this one in place? payload = Reference
  kProbe = 65,
  kProbed = 66,
};

struct Header {
  uint32_t protocol = kProtocol;
  Type type = Type::kAsk;
  std::array<uint64_t, 2> session{};  // the receiver's link, by the random number it gave
  uint32_t slot = 0;
  SlotKind kind = SlotKind::kGrant;
  uint64_t generation = 0;
  uint64_t transfer = 0;  // number that the moving side gave the transfer
  uint64_t seq = 0;       // of the chunk, within the transfer
  Status status = Status::kPending;
  uint8_t direct = 0;  // kBegin: puts or gets are wanted; kBegun: and allowed
  uint8_t with_digest = 1;
  uint8_t by_reference = 0;  // kChunk, kPulled: payload = Reference
  uint8_t reserved[4] = {};
  int32_t layer = 0;  // the owner's stored layer
  int32_t model_layer = 0;
  int32_t num_heads = 0;
  int32_t head = 0;        // first of them in the owner's pool
  int32_t model_head = 0;  // and in the model
  int32_t peer_layer = 0;  // pulls: where it goes, stored layer and first head
  int32_t peer_head = 0;
  int32_t reserved2 = 0;
  int64_t first = 0, count = 0;  // tokens
  uint64_t rows = 0, digest = 0;

  SlotKey key() const { return {slot, generation}; }
  std::string bytes() const { return {reinterpret_cast<const char*>(this), sizeof *this}; }
  // False when it cannot be one of ours.
  static bool parse(std::string_view bytes, Header* header) {
    if (bytes.size() != sizeof *header) return false;
    std::memcpy(static_cast<void*>(header), bytes.data(), sizeof *header);
    return header->protocol == kProtocol && header->status <= Status::kBusy &&
           (header->kind == SlotKind::kGrant || header->kind == SlotKind::kOffer);
  }
};
static_assert(sizeof(Header) == 128);

// Most bytes that come with kBegin and kBegun.
inline constexpr size_t kMaxTermsBytes = size_t{64} << 20;
// And with kChunk and kPulled: no honest peer sends more at once.
inline constexpr int64_t kMaxChunkBytes = int64_t{1} << 30;

}  // namespace kvlink::transport::ucx
