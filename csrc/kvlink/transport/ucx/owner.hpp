// The owner's side of a link: enters its own pages on the peer's behalf, after it has compared
// every field of a message with what the slot promises.
#pragma once

#include <map>
#include <mutex>
#include <optional>

#include "kvlink/transport/control.hpp"
#include "kvlink/transport/ucx/messages.hpp"
#include "kvlink/transport/ucx/port.hpp"

namespace kvlink::transport::ucx {

class Link;

class Owner {
 public:
  // `bit`: the peer's, in our slots.
  Owner(Link& link, uint32_t bit) : link_(link), bit_(bit) {}

  // On the engine's thread; what takes longer goes to the mover.
  void on_message(const Header& header, Payload payload);
  // Any thread: tells the peer how a slot ended that it had begun with.
  void on_closed(SlotKey key, Status status);
  // Most payload bytes that a message may bring; -1 when it may not come at all.
  int64_t max_payload(const Header& header) const;

 private:
  // The stored layers of a puller: their layout, and the scales that they share.
  struct Destination {
    std::vector<LayerView> layers;
    std::vector<float> scales;
  };
  // The peer's use of one slot.
  struct Session {
    SlotKey key;
    SlotKind kind = SlotKind::kGrant;
    uint64_t transfer = 0;           // the one that began last
    bool active = false;             // it has not finished
    std::vector<uint64_t> watchers;  // transfers that want to know the outcome
    struct Inside {
      int32_t layer = 0;
      uint64_t rows = 0;
    };
    std::map<uint64_t, Inside> inside;  // by seq: puts and gets that the peer may be at
    int pins = 0;
    // Pulls: what the chunks are packed for.
    std::shared_ptr<Destination> destination;
    std::map<uint64_t, std::shared_ptr<Mapping>> lent;  // by seq: chunks it reads in place
    std::optional<Status> consumed;
  };
  using SessionPtr = std::shared_ptr<Session>;

  void begin(const Header& header, const Payload& payload);
  void land(const Header& header, const Payload& payload);
  void pack(const Header& header);
  void enter(const Header& header);
  void leave(const Header& header);
  void finish(const Header& header);
  void consume(const Header& header);
  std::string terms(const OwnPages& own, bool direct);
  // Null when the message belongs to no transfer under way.
  SessionPtr session(const Header& header);
  // Of a chunk: empty, or what is wrong with it.
  std::string check_chunk(const Header& header, const OwnPages& own) const;
  Status pin(Session& session);
  void unpin(Session& session);
  void drop_if_over(Session& session);
  void answer(const Header& question, Type type, Status status);

  Link& link_;
  const uint32_t bit_;
  std::mutex mutex_;
  std::map<uint32_t, SessionPtr> sessions_;  // by slot
};

}  // namespace kvlink::transport::ucx
