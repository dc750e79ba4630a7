#include "kvlink/transport/ucx/link.hpp"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "kvlink/base/check.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/transport/ucx/terms.hpp"
#include "kvlink/transport/ucx/transfer.hpp"

namespace kvlink::transport::ucx {

namespace {

constexpr char kMagic[4] = {'K', 'V', 'U', 'X'};
constexpr int64_t kCloseGraceNs = 20'000'000;
constexpr int64_t kProbeNs = 500'000'000;  // until the first transfer does without the answer
constexpr int64_t kDelayNs = 50'000'000;   // of a message that a fault test delays

std::array<uint64_t, 2> random_session() {
  std::array<uint64_t, 2> session;
  if (getrandom(session.data(), sizeof session, 0) != ssize_t{sizeof session}) {
    throw std::system_error(errno, std::generic_category(), "getrandom");
  }
  return session;
}

}  // namespace

std::shared_ptr<Link> Link::open(std::shared_ptr<Hub> hub, uint32_t bit) {
  KVLINK_CHECK(bit < kMaxLinks, "bit: expected below ", kMaxLinks, "; got ", bit);
  auto port = Port::open(hub->engine);
  auto link = std::make_shared<Link>(hub, bit, port);
  const std::weak_ptr<Link> weak = link;
  // Ends every call into a link that is gone.
  const auto with = [weak](auto call, auto otherwise) {
    return [weak, call, otherwise](auto&&... arguments) {
      const auto alive = weak.lock();
      return alive ? call(*alive, std::forward<decltype(arguments)>(arguments)...) : otherwise;
    };
  };
  port->set_handlers(
      with([](Link& self, std::string_view header,
              size_t size) { return self.accept(header, size); },
           false),
      [weak](std::string_view header, Payload payload) {
        if (const auto alive = weak.lock()) alive->on_message(header, std::move(payload));
      },
      [weak](const std::string& why) {
        if (const auto alive = weak.lock()) alive->fail(why);
      },
      with([](Link& self, size_t size) { return self.take_room(size); },
           std::shared_ptr<Mapping>()));
  link->incoming_->set_on_freed([port = std::weak_ptr<Port>(port)] {
    if (const auto alive = port.lock()) alive->room_freed();
  });
  hub->add(link);
  return link;
}

Link::Link(std::shared_ptr<Hub> hub, uint32_t bit, std::shared_ptr<Port> port)
    : hub_(std::move(hub)),
      port_(std::move(port)),
      session_(random_session()),
      outgoing_(std::make_shared<Buffers>(hub_->engine, kChunkBytes, kWindow)),
      replies_(std::make_shared<Buffers>(hub_->engine, kChunkBytes, 4 * kWindow)),
      incoming_(std::make_shared<Buffers>(hub_->engine, kChunkBytes, kWindow)),
      owner_(std::make_unique<Owner>(*this, bit)) {}

Link::~Link() { close(Status::kCancelled); }

std::string Link::describe() const {
  std::string bytes(kMagic, sizeof kMagic);
  bytes.append(reinterpret_cast<const char*>(&kProtocol), 4);
  bytes.append(reinterpret_cast<const char*>(session_.data()), sizeof session_);
  return bytes + port_->address();
}

void Link::connect(std::string_view description, bool same_host) {
  constexpr size_t kFixed = 8 + sizeof session_;
  uint32_t protocol = 0;
  KVLINK_CHECK(
      description.size() > kFixed && description.substr(0, 4) == std::string_view(kMagic, 4),
      "description: not one of a ucx link");
  std::memcpy(&protocol, description.data() + 4, 4);
  KVLINK_CHECK(protocol == kProtocol, "description: expected protocol ", kProtocol, "; got ",
               protocol);
  {
    std::lock_guard lock(mutex_);
    std::memcpy(peer_session_.data(), description.data() + 8, sizeof peer_session_);
  }
  port_->connect(std::string(description.substr(kFixed)), same_host);
  if (same_host) probe();
}

bool Link::direct_allowed() {
  // A process that was stopped can go on writing through these, whatever its peer has done since.
  constexpr std::string_view kOutliving[] = {"cma", "xpmem", "knem", "cuda_ipc"};
  const std::vector<std::string> names = port_->transports();
  for (const std::string& name : names) {
    for (const std::string_view kind : kOutliving) {
      if (name.starts_with(kind)) return false;
    }
  }
  return !names.empty();
}

std::optional<InlineTasks> Link::inline_tasks() {
  if (!port_->all_pass()) return std::nullopt;
  return std::optional<InlineTasks>(std::in_place);
}

std::shared_ptr<Mapping> Link::take_reply(size_t size) {
  return size > kChunkBytes ? hub_->engine->map(nullptr, size) : replies_->try_take();
}

std::shared_ptr<Mapping> Link::take_room(size_t size) {
  return size > kChunkBytes ? hub_->engine->map(nullptr, size) : incoming_->try_take();
}

// --- messages ------------------------------------------------------------------------------------

void Link::send(Header header, Outgoing payload, Done done) {
  {
    std::lock_guard lock(mutex_);
    header.session = peer_session_;
  }
  payload.header = header.bytes();
  if (take_fault(Fault::kDrop)) {
    if (done) done(UCS_OK);
    return;
  }
  if (take_fault(Fault::kDuplicate)) port_->send(payload);
  if (take_fault(Fault::kDelay)) {
    std::thread([payload, done, port = port_] {
      std::this_thread::sleep_for(std::chrono::nanoseconds(kDelayNs));
      port->send(payload, done);
    }).detach();
    return;
  }
  port_->send(std::move(payload), std::move(done));
}

bool Link::send_chunk(Header header, const std::shared_ptr<Mapping>& buffer, size_t size) {
  if (take_fault(Fault::kFlipBit)) buffer->data()[size / 2] ^= std::byte{0x10};
  header.by_reference = peer_maps_.load() && size <= kChunkBytes;
  ++(header.by_reference != 0 ? counts.in_place : counts.copied);
  if (header.by_reference == 0) {
    send(header,
         {.header = {}, .data = buffer->data(), .size = size, .mapping = buffer, .keep = buffer});
    return false;
  }
  send_bytes(header, Reference{.address = reinterpret_cast<uint64_t>(buffer->data()),
                               .size = size,
                               .key = buffer->rkey()}
                         .bytes());
  return true;
}

void Link::send_bytes(const Header& header, std::string bytes) {
  const auto kept = std::make_shared<std::string>(std::move(bytes));
  send(
      header,
      {.header = {}, .data = kept->data(), .size = kept->size(), .mapping = nullptr, .keep = kept});
}

// Asks whether the peer can read buffers of ours in place, by one that begins with our session.
void Link::probe() {
  const auto probed = outgoing_->try_take();
  std::memcpy(probed->data(), session_.data(), sizeof session_);
  {
    std::lock_guard lock(mutex_);
    probed_ = probed;
  }
  Header header;
  header.type = Type::kProbe;
  send_bytes(header, Reference{.address = reinterpret_cast<uint64_t>(probed->data()),
                               .size = sizeof session_,
                               .key = probed->rkey()}
                         .bytes());
}

// Replaces a reference by what it refers to.
bool Link::resolve(Header& header, Payload& payload) {
  Reference reference;
  const auto bytes = payload.bytes();
  if (!Reference::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, &reference) ||
      reference.size > kChunkBytes) {
    breach("the reference to a chunk is malformed");
    return false;
  }
  const std::byte* here = port_->map_remote(reference.address, reference.key);
  if (here == nullptr && header.type != Type::kProbe)
    breach("a chunk lies where nobody can read it");
  payload = here ? Payload({here, reference.size}, nullptr) : Payload();
  return here != nullptr;
}

bool Link::accept(std::string_view bytes, size_t payload_bytes) {
  Header header;
  if (!Header::parse(bytes, &header) || header.session != session_) {
    ++counts.dropped;
    return false;
  }
  int64_t most = owner_->max_payload(header);
  if (header.type == Type::kBegun) most = static_cast<int64_t>(kMaxTermsBytes);
  if (header.type == Type::kPulled) most = kMaxChunkBytes;
  if (header.type == Type::kProbe) most = 65536;
  if (header.type == Type::kDone || header.type == Type::kEntered ||
      header.type == Type::kOutcome || header.type == Type::kProbed) {
    most = 0;
  }
  if (static_cast<int64_t>(payload_bytes) > most) {
    breach(
        concat("message ", static_cast<uint32_t>(header.type), " with ", payload_bytes, " bytes"));
    return false;
  }
  return true;
}

void Link::on_message(std::string_view bytes, Payload payload) {
  Header header;
  if (!Header::parse(bytes, &header)) return;
  if (header.type == Type::kProbe) {
    const bool found = resolve(header, payload);
    const auto peer_session = [&] {
      std::lock_guard lock(mutex_);
      return peer_session_;
    }();
    const bool same =
        found && payload.bytes().size() == sizeof peer_session &&
        std::memcmp(payload.bytes().data(), peer_session.data(), sizeof peer_session) == 0;
    header.type = Type::kProbed;
    header.status = same ? Status::kOk : Status::kMoveFailed;
    return send(header);
  }
  if (header.type == Type::kProbed) {
    {
      std::lock_guard lock(mutex_);
      peer_maps_ = header.status == Status::kOk;
      probed_.reset();
    }
    changed_.notify_all();
    return;
  }
  const bool chunk = header.type == Type::kChunk || header.type == Type::kPulled;
  if (chunk && header.by_reference != 0 && !resolve(header, payload)) return;
  if (owner_->max_payload(header) >= 0) return owner_->on_message(header, std::move(payload));
  std::shared_ptr<UcxTransfer> transfer;
  {
    std::lock_guard lock(mutex_);
    const auto found = transfers_.find(header.transfer);
    if (found != transfers_.end() && header.seq != kHeldSeq) transfer = found->second.lock();
  }
  if (!transfer) return on_begun(header, payload);
  if (header.type != Type::kPulled) return transfer->on_answer(header);
  if (payload.passes()) return transfer->land(header, payload);
  hub_->mover.submit(this, [transfer = std::move(transfer), header, payload = std::move(payload)] {
    transfer->land(header, payload);
  });
}

// An answer to something that is no transfer yet, or no more.
void Link::on_begun(const Header& header, const Payload& payload) {
  Terms terms;
  const auto bytes = payload.bytes();
  const std::string_view content(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const bool with_terms = header.type == Type::kBegun && header.status == Status::kOk;
  if (with_terms && !Terms::parse(content, &terms)) {
    return breach("the terms of a slot are malformed");
  }
  {
    std::lock_guard lock(mutex_);
    const auto found = beginnings_.find(header.transfer);
    if (found == beginnings_.end()) {
      ++counts.dropped;
      return;
    }
    Beginning& beginning = *found->second;
    if (header.type == Type::kOutcome) {
      beginning.outcome = header.status;
      return;
    }
    if (header.type != beginning.expected) return;
    beginning.expected = Type::kAsk;  // none: the rest are duplicates
    beginning.answered = true;
    beginning.status = header.status;
    beginning.reply = header;
    beginning.terms = std::move(terms);
  }
  changed_.notify_all();
}

void Link::breach(const std::string& what) { fail("the peer broke the protocol: " + what); }

void Link::fail(const std::string& why) {
  {
    std::lock_guard lock(mutex_);
    if (failed_.empty()) failed_ = why;
  }
  changed_.notify_all();
}

std::string Link::failed() const {
  std::lock_guard lock(mutex_);
  return failed_;
}

void Link::forget(uint64_t number) {
  std::lock_guard lock(mutex_);
  transfers_.erase(number);
}

uint32_t Link::number_of(const RemoteBlock& block) {
  const std::string name = concat(block.address, " ", block.size, " ") + block.key;
  uint32_t number;
  {
    std::lock_guard lock(mutex_);
    const auto [found, fresh] =
        block_numbers_.emplace(name, static_cast<uint32_t>(block_numbers_.size()));
    if (!fresh) return found->second;
    number = found->second;
  }
  port_->add_key(number, block.key);
  return number;
}

// --- beginning and ending ------------------------------------------------------------------------

Status Link::ask(Header question, std::string payload, const std::shared_ptr<Beginning>& beginning,
                 int64_t deadline_ns) {
  std::unique_lock lock(mutex_);
  const auto over = [&] { return closing_ || !failed_.empty(); };
  if (over()) return Status::kPeerLost;
  beginning->answered = false;
  beginning->expected = question.type == Type::kBegin ? Type::kBegun : Type::kEntered;
  lock.unlock();
  send_bytes(question, std::move(payload));
  lock.lock();
  while (!beginning->answered && !over() && now_ns() < deadline_ns) {
    changed_.wait_for(lock, std::chrono::nanoseconds(deadline_ns - now_ns()));
  }
  if (beginning->answered) return beginning->status;
  return over() ? Status::kPeerLost : Status::kTimeout;
}

std::shared_ptr<PostedTransfer> Link::begin(TransferSpec spec, const RemotePool& peer,
                                            int64_t deadline_ns, Status* status) {
  const bool push = spec.kind == SlotKind::kGrant;
  PoolLayers& theirs = push ? spec.dst : spec.src;
  std::vector<int32_t>& their_pages = push ? spec.dst_pages : spec.src_pages;
  theirs.layers = scale_layers(peer.layout, peer.num_layers, peer.num_pages, nullptr);
  const int64_t size = peer.layout.page_size;
  their_pages.assign(static_cast<size_t>((spec.num_tokens + size - 1) / size), 0);
  check_spec(spec);

  Header header;
  header.type = Type::kBegin;
  header.slot = spec.key.slot;
  header.generation = spec.key.generation;
  header.kind = spec.kind;
  {
    std::unique_lock lock(mutex_);
    const int64_t until = std::min(deadline_ns, now_ns() + kProbeNs);
    while (probed_ && !closing_ && failed_.empty() && now_ns() < until) {
      changed_.wait_for(lock, std::chrono::nanoseconds(until - now_ns()));
    }
  }
  // What the peer reads in place is packed once and scattered once; a put would be copied, too.
  // Over TCP, UCX itself makes messages of puts and gets, with more copies than ours have.
  header.direct =
      !peer_maps_ && (!port_->all_pass() || hub_->puts_over_tcp) && direct_pays(spec, kDirectBytes);
  std::string payload;
  if (!push) {
    const KVLayout& layout = spec.dst.layers.front().layout;
    payload = Target{.layout = layout,
                     .num_layers = static_cast<uint32_t>(spec.dst.layers.size()),
                     .scales = shared_scales(spec.dst.layers)}
                  .bytes();
  }
  const auto beginning = std::make_shared<Beginning>();
  {
    std::lock_guard lock(mutex_);
    header.transfer = next_number_++;
    beginnings_[header.transfer] = beginning;
  }
  *status = ask(header, std::move(payload), beginning, deadline_ns);
  std::shared_ptr<UcxTransfer> transfer;
  {
    std::unique_lock lock(mutex_);
    if (*status == Status::kOk) {
      lock.unlock();
      transfer = UcxTransfer::create(shared_from_this(), header.transfer, std::move(spec),
                                     beginning->reply, std::move(beginning->terms), status);
      lock.lock();
    }
    if (transfer) transfers_[header.transfer] = transfer;
    beginnings_.erase(header.transfer);
  }
  if (!transfer) {
    // An answer that is still under way, or one that nobody can use.
    if (*status == Status::kTimeout || beginning->answered) {
      header.type = Type::kFinish;
      send(header);
    }
    return nullptr;
  }
  worker_->add(transfer);
  if (beginning->outcome != Status::kPending) transfer->on_outcome(beginning->outcome);
  if (closed()) transfer->fail(Status::kPeerLost);
  return transfer;
}

void Link::close(Status status) {
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(closing_, true)) return;
  }
  changed_.notify_all();
  worker_->close(status);
  hub_->mover.drain(this);
  std::vector<std::shared_ptr<UcxTransfer>> open;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [number, held] : transfers_) {
      if (auto transfer = held.lock()) open.push_back(std::move(transfer));
    }
  }
  // What was cancelled here is told as that, before the link's end tells something else.
  const int64_t until = now_ns() + (failed().empty() ? 5 * kCloseGraceNs : 0);
  for (const auto& transfer : open) transfer->wait_cancelled(until);
  port_->close(failed().empty() ? kCloseGraceNs : 0);
  hub_->mover.drain(this);
  for (const auto& transfer : open) transfer->on_link_closed();
}

}  // namespace kvlink::transport::ucx
