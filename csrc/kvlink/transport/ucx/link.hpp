// A link of this path: its port, who listens to which message, and what it takes to begin.
#pragma once

#include <atomic>
#include <map>
#include <optional>
#include <unordered_map>

#include "kvlink/base/threads.hpp"
#include "kvlink/transport/posting.hpp"
#include "kvlink/transport/ucx/hub.hpp"
#include "kvlink/transport/ucx/messages.hpp"
#include "kvlink/transport/ucx/owner.hpp"
#include "kvlink/transport/ucx/port.hpp"
#include "kvlink/transport/ucx/staging.hpp"
#include "kvlink/transport/ucx/terms.hpp"

namespace kvlink::transport::ucx {

class UcxTransfer;

// What a fault test asks for; of the messages that this side sends from then on.
enum class Fault : uint8_t { kDrop = 0, kDuplicate = 1, kFlipBit = 2, kDelay = 3 };
inline constexpr int kNumFaults = 4;
inline constexpr uint64_t kHeldSeq = ~uint64_t{0};  // of the chunk that a fault test holds

// A peer's pool, as far as a transfer needs to know it before it begins.
struct RemotePool {
  KVLayout layout;
  size_t num_layers = 0;  // stored
  int64_t num_pages = 0;
};

class Link : public std::enable_shared_from_this<Link> {
 public:
  // `bit`: the peer's, in our slots. Throws std::runtime_error.
  static std::shared_ptr<Link> open(std::shared_ptr<Hub> hub, uint32_t bit);
  Link(std::shared_ptr<Hub> hub, uint32_t bit, std::shared_ptr<Port> port);
  ~Link();

  // What the peer needs to reach this link.
  std::string describe() const;
  // Throws InvalidArgument when it is not the peer's describe().
  void connect(std::string_view description, bool same_host);
  // Takes the peer's slot and waits for its terms until deadline_ns. A slot that cannot be taken is
  // told by *status and gives null. spec: the peer's pool and pages are filled in here.
  std::shared_ptr<PostedTransfer> begin(TransferSpec spec, const RemotePool& peer,
                                        int64_t deadline_ns, Status* status);
  // Why this link is of no use any more; empty while it is.
  std::string failed() const;
  std::vector<std::string> transports() { return port_->transports(); }
  // Ends every transfer; when it returns nothing of the peer is touched, and it touches nothing.
  void close(Status status);
  bool closed() const { return worker_->closed(); }
  void inject(Fault fault, int count);
  bool has_fault(Fault fault) const { return faults_[static_cast<size_t>(fault)].load() > 0; }
  // For fault tests: pins the pages of a slot, as a writer that is about to put, until leave(). As
  // part of the transfer that is open to it, if there is one; then leave() puts first, if it may.
  Status enter(SlotKey key, SlotKind kind, int32_t model_layer, int32_t model_head,
               int64_t deadline_ns);
  void leave();
  struct Counts {
    // Messages of another session, or the answer to nothing, that were dropped.
    std::atomic<uint64_t> dropped{0};
    // Chunks that waited for room in the window, and questions to a peer that had been silent.
    std::atomic<uint64_t> credit_waits{0}, asked{0};
    // Chunks that this side sent: through a buffer, read there by the peer, from the pages
    // themselves, put or got.
    std::atomic<uint64_t> copied{0}, in_place{0}, gathered{0}, direct{0};
  };
  Counts counts;

  // --- for the owner's side and the transfers ---
  void send(Header header, Outgoing payload = {}, Done done = {});
  void send_bytes(const Header& header, std::string bytes);
  // A chunk in a buffer: by reference where the peer can read it there. True when it must stay as
  // it is until the peer has answered.
  bool send_chunk(Header header, const std::shared_ptr<Mapping>& buffer, size_t size);
  // The peer said what it may not say: the link is of no use any more.
  void breach(const std::string& what);
  void forget(uint64_t number);
  // The port's number of a peer's block. Throws std::runtime_error.
  uint32_t number_of(const RemoteBlock& block);
  Hub& hub() { return *hub_; }
  Port& port() { return *port_; }
  Buffers& outgoing() { return *outgoing_; }
  // Most bytes of a staged chunk.
  size_t chunk_bytes() const { return port_->all_pass() ? kPassingChunkBytes : kChunkBytes; }
  // Where chunks are small, and others move meanwhile: keeps the executor on the thread that has
  // it.
  std::optional<InlineTasks> inline_tasks();
  // Room for the answer to a pull; null when more than a window of them is under way.
  std::shared_ptr<Mapping> take_reply(size_t size);
  // Whether destroying our port ends everything that the peer could do to memory it has keys of.
  bool direct_allowed();
  const std::shared_ptr<Worker>& worker() const { return worker_; }
  void on_closed(SlotKey key, Status status) { owner_->on_closed(key, status); }

 private:
  // A begin that waits for its answer.
  struct Beginning {
    Type expected = Type::kBegun;
    bool answered = false;
    Status status = Status::kPending;
    Status outcome = Status::kPending;  // when the slot ended meanwhile
    Header reply;
    Terms terms;
  };
  // Sends a question and waits for its answer: the status of that, or why there is none.
  Status ask(Header question, std::string payload, const std::shared_ptr<Beginning>& beginning,
             int64_t deadline_ns);
  bool accept(std::string_view header, size_t payload_bytes);
  void on_message(std::string_view bytes, Payload payload);
  void on_begun(const Header& header, const Payload& payload);
  std::shared_ptr<Mapping> take_room(size_t size);
  void fail(const std::string& why);
  bool take_fault(Fault fault);
  void probe();
  bool resolve(Header& header, Payload& payload);

  const std::shared_ptr<Hub> hub_;
  const std::shared_ptr<Port> port_;
  const std::array<uint64_t, 2> session_;  // ours, random: what is meant for this link
  std::array<uint64_t, 2> peer_session_{};
  const std::shared_ptr<Worker> worker_ = std::make_shared<Worker>();
  const std::shared_ptr<Buffers> outgoing_, replies_, incoming_;
  const std::unique_ptr<Owner> owner_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<uint64_t, std::weak_ptr<UcxTransfer>> transfers_;  // by number
  std::unordered_map<uint64_t, std::shared_ptr<Beginning>> beginnings_;
  uint64_t next_number_ = 1;
  Header entered_;  // for leave()
  std::weak_ptr<UcxTransfer> held_;
  std::map<std::string, uint32_t> block_numbers_;
  std::string failed_;
  bool closing_ = false;
  std::atomic<bool> peer_maps_{false};  // it can read our buffers in place
  std::shared_ptr<Mapping> probed_;
  std::array<std::atomic<int>, kNumFaults> faults_{};
};

}  // namespace kvlink::transport::ucx
