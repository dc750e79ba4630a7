#include "kvlink/transport/ucx/owner.hpp"

#include <algorithm>

#include "kvlink/base/check.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/transport/ucx/link.hpp"
#include "kvlink/transport/ucx/terms.hpp"

namespace kvlink::transport::ucx {

namespace {

bool in_range(int32_t first, int32_t count, int32_t limit) {
  return first >= 0 && count >= 1 && count <= limit - first;
}

TokenRun run_of(const OwnPages& own, const KVLayout& layout, int64_t first) {
  const int64_t skip = first / layout.page_size;
  return {own.pages.data() + skip, std::ssize(own.pages) - skip, first % layout.page_size};
}

constexpr int32_t kFirstPage[] = {0};  // of a staged chunk, which is one page

}  // namespace

int64_t Owner::max_payload(const Header& header) const {
  switch (header.type) {
    case Type::kBegin:
      return header.kind == SlotKind::kOffer ? static_cast<int64_t>(kMaxTermsBytes) : 0;
    case Type::kChunk:
      return kMaxChunkBytes;
    case Type::kPull:
    case Type::kEnter:
    case Type::kLeave:
    case Type::kFinish:
    case Type::kCancel:
    case Type::kConsume:
    case Type::kAsk:
    case Type::kLanded:
      return 0;
    default:
      return -1;
  }
}

void Owner::on_message(const Header& header, Payload payload) {
  if (header.slot >= link_.hub().control->num_slots()) {
    return link_.breach(concat("slot ", header.slot, " does not exist"));
  }
  const auto later = [&](void (Owner::*job)(const Header&)) {
    link_.hub().mover.submit(&link_, [this, job, header] { (this->*job)(header); });
  };
  switch (header.type) {
    case Type::kBegin:
      return begin(header, payload);
    case Type::kChunk:
      if (payload.passes()) return land(header, payload);
      return link_.hub().mover.submit(
          &link_, [this, header, payload = std::move(payload)] { land(header, payload); });
    case Type::kPull:
      return later(&Owner::pack);
    case Type::kEnter:
      return later(&Owner::enter);
    case Type::kLeave:
      return leave(header);
    case Type::kFinish:
    case Type::kCancel:
      return finish(header);
    case Type::kConsume:
      return consume(header);
    case Type::kLanded:
      if (const SessionPtr session = this->session(header)) {
        std::lock_guard lock(mutex_);
        session->lent.erase(header.seq);
      }
      return;
    default:
      return answer(header, Type::kOutcome, link_.hub().control->status(header.key()));
  }
}

void Owner::answer(const Header& question, Type type, Status status) {
  Header reply = question;
  reply.type = type;
  reply.status = status;
  link_.send(reply);
}

// --- sessions ------------------------------------------------------------------------------------

Owner::SessionPtr Owner::session(const Header& header) {
  std::lock_guard lock(mutex_);
  const auto found = sessions_.find(header.slot);
  if (found == sessions_.end()) return nullptr;
  const SessionPtr& session = found->second;
  const bool same = session->key.generation == header.generation && session->active &&
                    session->transfer == header.transfer && session->kind == header.kind;
  return same ? session : nullptr;
}

void Owner::begin(const Header& header, const Payload& payload) {
  Control& control = *link_.hub().control;
  const SlotKey key = header.key();
  std::shared_ptr<Destination> destination;
  if (header.kind == SlotKind::kOffer) {
    const auto bytes = payload.bytes();
    Target target;
    if (!Target::parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, &target)) {
      return link_.breach("the target of a pull is malformed");
    }
    destination = std::make_shared<Destination>();
    destination->scales = std::move(target.scales);
    destination->layers =
        scale_layers(target.layout, target.num_layers, 1, destination->scales.data());
  }
  {
    std::lock_guard lock(mutex_);
    const auto found = sessions_.find(key.slot);
    const bool known = found != sessions_.end() && found->second->active &&
                       found->second->key.generation == key.generation &&
                       found->second->transfer == header.transfer;
    if (known) return;  // a duplicate
  }
  const auto own = control.own(key);
  Status status = own ? control.begin(key, bit_) : control.status(key);
  if (status == Status::kOk && !own) status = Status::kStale;
  if (status == Status::kOk && control.slot(key.slot).kind != header.kind) {
    control.finish(key, bit_);
    return link_.breach("a grant was begun as an offer, or the other way round");
  }
  Header reply = header;
  reply.type = Type::kBegun;
  reply.status = status;
  if (status != Status::kOk) return link_.send(reply);
  {
    std::lock_guard lock(mutex_);
    SessionPtr& session = sessions_[key.slot];
    if (!session || session->key.generation != key.generation) {
      session = std::make_shared<Session>();
      session->key = key;
      session->kind = header.kind;
    }
    session->destination = std::move(destination);
    session->consumed.reset();
    session->transfer = header.transfer;
    session->active = true;
    session->watchers.push_back(header.transfer);
  }
  reply.with_digest = control.slot(key.slot).with_digest.load() != 0;
  reply.direct = header.direct != 0 && link_.direct_allowed();
  auto bytes = std::make_shared<std::string>(terms(*own, reply.direct != 0));
  link_.send(reply, {.header = {},
                     .data = bytes->data(),
                     .size = bytes->size(),
                     .mapping = nullptr,
                     .keep = bytes});
  // One that ended before it had a watcher.
  if (const Status now = control.status(key); now != Status::kPending) on_closed(key, now);
}

std::string Owner::terms(const OwnPages& own, bool direct) {
  Terms terms;
  terms.scales = shared_scales(own.layers);
  if (direct) {
    terms.pages = own.pages;
    for (const LayerView& layer : own.layers) {
      terms.planes.push_back(reinterpret_cast<uint64_t>(layer.k));
      terms.planes.push_back(reinterpret_cast<uint64_t>(layer.v));
    }
    for (const auto& block : link_.hub().map_layers(own)) {
      terms.blocks.push_back(
          {reinterpret_cast<uint64_t>(block->data()), block->size(), block->rkey()});
    }
  }
  return terms.bytes();
}

void Owner::on_closed(SlotKey key, Status status) {
  SessionPtr session;
  std::vector<uint64_t> watchers;
  {
    std::lock_guard lock(mutex_);
    const auto found = sessions_.find(key.slot);
    if (found == sessions_.end() || found->second->key.generation != key.generation) return;
    session = found->second;
    watchers.swap(session->watchers);
    drop_if_over(*session);
  }
  Header outcome;
  outcome.type = Type::kOutcome;
  outcome.slot = key.slot;
  outcome.generation = key.generation;
  outcome.kind = session->kind;
  outcome.status = status;
  for (const uint64_t transfer : watchers) {
    outcome.transfer = transfer;
    link_.send(outcome);
  }
}

void Owner::drop_if_over(Session& session) {
  if (session.watchers.empty() && session.pins == 0 && !session.active) {
    sessions_.erase(session.key.slot);
  }
}

// --- entering ------------------------------------------------------------------------------------

Status Owner::pin(Session& session) {
  Control& control = *link_.hub().control;
  std::lock_guard lock(mutex_);
  Status status = Status::kOk;
  if (session.pins == 0) {
    status = control.enter(session.key, bit_);
  } else if (status = control.status(session.key); status == Status::kPending) {
    // NOTE: our bit is up, so nobody verifies or gives the pages back.
    status = now_ns() > control.slot(session.key.slot).deadline_ns.load() ? Status::kExpired
                                                                          : Status::kOk;
  } else if (status == Status::kOk) {
    status = Status::kStale;
  }
  if (status == Status::kOk) ++session.pins;
  return status;
}

void Owner::unpin(Session& session) {
  std::lock_guard lock(mutex_);
  if (--session.pins == 0) link_.hub().control->leave(session.key, bit_);
}

std::string Owner::check_chunk(const Header& header, const OwnPages& own) const {
  if (header.layer < 0 || header.layer >= std::ssize(own.layers)) {
    return concat("layer ", header.layer, " of ", own.layers.size());
  }
  const KVLayout& layout = own.layers[header.layer].layout;
  if (!in_range(header.head, header.num_heads, layout.num_kv_heads)) {
    return concat("heads ", header.head, " + ", header.num_heads, " of ", layout.num_kv_heads);
  }
  if (header.model_layer != own.model_layers[header.layer] ||
      header.model_head != own.model_head + header.head) {
    return concat("model layer ", header.model_layer, ", head ", header.model_head, " in layer ",
                  header.layer, ", head ", header.head);
  }
  if (header.first < 0 || header.count < 1 || header.count > own.num_tokens - header.first) {
    return concat("tokens ", header.first, " + ", header.count, " of ", own.num_tokens);
  }
  return {};
}

void Owner::land(const Header& header, const Payload& payload) {
  Hub& hub = link_.hub();
  const SessionPtr session = this->session(header);
  const auto own = session ? hub.control->own(session->key) : nullptr;
  if (!own || session->kind != SlotKind::kGrant) {
    const Status status = hub.control->status(header.key());
    const bool over = status == Status::kOk || status == Status::kPending;
    return answer(header, Type::kDone, over ? Status::kStale : status);
  }
  std::string wrong = check_chunk(header, *own);
  const LayerView* layer = wrong.empty() ? &own->layers[header.layer] : nullptr;
  const auto bytes = payload.bytes();
  if (layer && bytes.size() != staged_bytes(layer->layout, header.num_heads, header.count)) {
    wrong = concat(bytes.size(), " bytes for ", header.count, " tokens");
  }
  if (!wrong.empty()) return link_.breach("a chunk does not fit its grant: " + wrong);
  if (const Status status = pin(*session); status != Status::kOk) {
    return answer(header, Type::kDone, status);
  }
  // Only read.
  const LayerView staged = staged_view(*layer, header.num_heads, header.head, header.count,
                                       const_cast<std::byte*>(bytes.data()));
  const size_t whole =
      staged_bytes(layer->layout, layer->layout.num_kv_heads, own->num_tokens) * own->layers.size();
  const std::optional<InlineTasks> inlined = link_.inline_tasks();
  Status status = Status::kOk;
  try {
    RelayoutResult moved = hub.executor.relayout({.src_layers = &staged,
                                                  .dst_layers = layer,
                                                  .model_layers = &header.model_layer,
                                                  .num_layers = 1,
                                                  .num_heads = header.num_heads,
                                                  .src_head = 0,
                                                  .dst_head = header.head,
                                                  .model_head = header.model_head,
                                                  .src = {kFirstPage, 1, 0},
                                                  .dst = run_of(*own, layer->layout, header.first),
                                                  .num_tokens = header.count,
                                                  .token_position = header.first,
                                                  .with_digest = false,
                                                  .whole_bytes = static_cast<int64_t>(whole)});
    moved.digest = header.digest;
    hub.control->add_rows(session->key, static_cast<uint32_t>(header.layer), moved);
  } catch (const std::exception&) {
    status = Status::kMoveFailed;
  }
  unpin(*session);
  answer(header, Type::kDone, status);
}

void Owner::pack(const Header& header) {
  Hub& hub = link_.hub();
  const SessionPtr session = this->session(header);
  const auto own = session ? hub.control->own(session->key) : nullptr;
  if (!own || session->kind != SlotKind::kOffer) {
    const Status status = hub.control->status(header.key());
    const bool over = status == Status::kOk || status == Status::kPending;
    return answer(header, Type::kDone, over ? Status::kStale : status);
  }
  std::shared_ptr<Destination> destination;
  {
    std::lock_guard lock(mutex_);
    if (session->lent.contains(header.seq)) return;  // a duplicate
    destination = session->destination;
  }
  const std::vector<LayerView>& target = destination->layers;
  std::string wrong = check_chunk(header, *own);
  if (header.peer_layer < 0 || header.peer_layer >= std::ssize(target)) {
    wrong = concat("the puller's layer ", header.peer_layer, " of ", target.size());
  } else if (!in_range(header.peer_head, header.num_heads,
                       target[header.peer_layer].layout.num_kv_heads)) {
    wrong = concat("the puller's heads ", header.peer_head, " + ", header.num_heads);
  }
  const size_t size =
      wrong.empty() ? staged_bytes(target[header.peer_layer].layout, header.num_heads, header.count)
                    : 0;
  if (wrong.empty() && static_cast<int64_t>(size) > kMaxChunkBytes) {
    wrong = concat(size, " bytes at once");
  }
  if (!wrong.empty()) return link_.breach("a chunk does not fit its offer: " + wrong);
  const std::shared_ptr<Mapping> buffer = link_.take_reply(size);
  if (!buffer) return link_.breach("more pulls at once than a window holds");
  if (const Status status = pin(*session); status != Status::kOk) {
    return answer(header, Type::kDone, status);
  }
  const LayerView& source = own->layers[header.layer];
  const LayerView staged = staged_view(target[header.peer_layer], header.num_heads,
                                       header.peer_head, header.count, buffer->data());
  Header reply = header;
  reply.type = Type::kPulled;
  reply.status = Status::kOk;
  const std::optional<InlineTasks> inlined = link_.inline_tasks();
  try {
    const RelayoutResult moved =
        hub.executor.relayout({.src_layers = &source,
                               .dst_layers = &staged,
                               .model_layers = &header.model_layer,
                               .num_layers = 1,
                               .num_heads = header.num_heads,
                               .src_head = header.head,
                               .dst_head = 0,
                               .model_head = header.model_head,
                               .src = run_of(*own, source.layout, header.first),
                               .dst = {kFirstPage, 1, 0},
                               .num_tokens = header.count,
                               .token_position = header.first,
                               .with_digest = header.with_digest != 0});
    reply.rows = moved.rows;
    reply.digest = moved.digest;
  } catch (const std::exception&) {
    reply.status = Status::kMoveFailed;
  }
  unpin(*session);
  if (reply.status != Status::kOk) return answer(header, Type::kDone, reply.status);
  {
    std::lock_guard lock(mutex_);
    if (session->active) session->lent[header.seq] = buffer;
  }
  if (link_.send_chunk(reply, buffer, size)) return;  // until the puller has read it there
  std::lock_guard lock(mutex_);
  session->lent.erase(header.seq);
}

void Owner::enter(const Header& header) {
  Hub& hub = link_.hub();
  const SessionPtr session = this->session(header);
  const auto own = session ? hub.control->own(session->key) : nullptr;
  if (!own) return answer(header, Type::kEntered, Status::kStale);
  if (const std::string wrong = check_chunk(header, *own); !wrong.empty()) {
    return link_.breach("a chunk does not fit its slot: " + wrong);
  }
  if (const Status status = pin(*session); status != Status::kOk) {
    return answer(header, Type::kEntered, status);
  }
  const LayerView& layer = own->layers[header.layer];
  Header reply = header;
  reply.type = Type::kEntered;
  reply.status = Status::kOk;
  reply.rows = static_cast<uint64_t>(header.count) * header.num_heads * num_planes(layer.layout);
  if (header.kind == SlotKind::kOffer && header.with_digest != 0) {
    try {
      reply.digest = hub.executor
                         .digest({.layers = &layer,
                                  .model_layers = &header.model_layer,
                                  .num_layers = 1,
                                  .num_heads = header.num_heads,
                                  .head = header.head,
                                  .model_head = header.model_head,
                                  .run = run_of(*own, layer.layout, header.first),
                                  .num_tokens = header.count,
                                  .token_position = header.first})
                         .digest;
    } catch (const std::exception&) {
      reply.status = Status::kMoveFailed;
    }
  }
  bool known = false;
  {
    std::lock_guard lock(mutex_);
    known = !session->active ||
            !session->inside.emplace(header.seq, Session::Inside{header.layer, reply.rows}).second;
  }
  if (known || reply.status != Status::kOk) unpin(*session);
  if (known && reply.status == Status::kOk) return;  // a duplicate: it was answered
  link_.send(reply);
}

void Owner::leave(const Header& header) {
  const SessionPtr session = this->session(header);
  if (!session) return answer(header, Type::kDone, Status::kStale);
  Control& control = *link_.hub().control;
  Session::Inside inside;
  {
    std::lock_guard lock(mutex_);
    const auto found = session->inside.find(header.seq);
    if (found == session->inside.end()) return;  // a duplicate: it was answered
    inside = found->second;
    session->inside.erase(found);
  }
  if (session->kind == SlotKind::kGrant) {
    if (header.status == Status::kOk) {
      control.add_rows(session->key, static_cast<uint32_t>(inside.layer),
                       {.rows = inside.rows, .digest = header.digest});
    } else if (header.status != Status::kCancelled) {
      // Nobody knows what it wrote.
      control.slot(session->key.slot).torn.store(1);
      control.close(session->key, Status::kPeerLost);
    }
  }
  unpin(*session);
  answer(header, Type::kDone, Status::kOk);
}

void Owner::finish(const Header& header) {
  const SessionPtr session = this->session(header);
  if (!session) return;
  Control& control = *link_.hub().control;
  if (header.type == Type::kCancel) {
    const bool ours = header.status == Status::kCancelled || header.status == Status::kMoveFailed;
    if (session->kind == SlotKind::kGrant && ours) control.close(session->key, header.status);
    return;
  }
  control.finish(session->key, bit_);
  std::lock_guard lock(mutex_);
  session->active = false;
  session->pins -= static_cast<int>(session->inside.size());
  if (!session->inside.empty() && session->pins == 0) control.leave(session->key, bit_);
  session->inside.clear();
  session->lent.clear();
  drop_if_over(*session);
}

void Owner::consume(const Header& header) {
  const SessionPtr session = this->session(header);
  if (!session || session->kind != SlotKind::kOffer) {
    return answer(header, Type::kDone, Status::kStale);
  }
  if (!session->consumed) session->consumed = link_.hub().control->consume(session->key);
  answer(header, Type::kDone, *session->consumed);
}

}  // namespace kvlink::transport::ucx
