// What fault tests ask of a link.
#include <algorithm>

#include "kvlink/transport/ucx/link.hpp"
#include "kvlink/transport/ucx/runs.hpp"
#include "kvlink/transport/ucx/transfer.hpp"

namespace kvlink::transport::ucx {

namespace {

// For a pull that moves nothing.
KVLayout no_layout() {
  KVLayout layout;
  layout.form = KVForm::kOpaque;
  layout.dtype = DType::kUInt8;
  layout.num_kv_heads = layout.head_dim = layout.page_size = 1;
  return layout;
}

}  // namespace

bool Link::take_fault(Fault fault) {
  std::atomic<int>& left = faults_[static_cast<size_t>(fault)];
  int seen = left.load();
  while (seen > 0 && !left.compare_exchange_weak(seen, seen - 1)) {
  }
  return seen > 0;
}

void Link::inject(Fault fault, int count) { faults_[static_cast<size_t>(fault)].store(count); }

// --- a writer between two instructions -----------------------------------------------------------

bool UcxTransfer::hold(Header* enter) {
  if (spec_.plan.parts.empty()) return false;
  const Chunk chunk{.part = 0,
                    .first = 0,
                    .count = std::min(chunk_tokens_, spec_.num_tokens),
                    .moved = {},
                    .started_ns = 0,
                    .step = Step::kMoving,
                    .buffer = nullptr};
  {
    std::lock_guard lock(reply_mutex_);
    if (ended_here_ || !chunks_.emplace(kHeldSeq, chunk).second) return false;
  }
  hold_source();
  *enter = chunk_message(Type::kEnter, kHeldSeq, chunk);
  return true;
}

void UcxTransfer::let_go(bool inside) {
  Chunk chunk;
  {
    std::lock_guard lock(reply_mutex_);
    const auto found = chunks_.find(kHeldSeq);
    if (found == chunks_.end()) return;
    chunk = found->second;
  }
  const auto self = std::static_pointer_cast<UcxTransfer>(shared_from_this());
  const Done over = [self, chunk, inside](ucs_status_t) {
    self->release_source();
    if (inside) {
      Header left = self->chunk_message(Type::kLeave, kHeldSeq, chunk);
      left.status = Status::kCancelled;
      self->link_->send(left);
    }
    bool last;
    {
      std::lock_guard lock(self->reply_mutex_);
      self->chunks_.erase(kHeldSeq);
      last = self->draining_ && self->chunks_.empty();
    }
    self->replied_.notify_all();
    if (last) self->fail(Status::kOk);
    self->finish_if_over();
  };
  if (!inside || !direct_ || spec_.kind != SlotKind::kGrant) return over(UCS_OK);
  link_->port().put(find_runs(chunk_params(chunk.part, chunk.first, chunk.count), true,
                              terms_->blocks, block_numbers_),
                    self, over);
}

Status Link::enter(SlotKey key, SlotKind kind, int32_t model_layer, int32_t model_head,
                   int64_t deadline_ns) {
  std::vector<std::shared_ptr<UcxTransfer>> open;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [number, weak] : transfers_) {
      if (auto transfer = weak.lock()) open.push_back(std::move(transfer));
    }
  }
  Header header;
  std::shared_ptr<UcxTransfer> held;
  for (const auto& transfer : open) {
    const SlotKey its = transfer->key();
    const bool same = its.slot == key.slot && its.generation == key.generation;
    if (!held && same && transfer->hold(&header)) held = transfer;
  }
  const auto beginning = std::make_shared<Beginning>();
  Status status = Status::kOk;
  if (held) {
    std::lock_guard lock(mutex_);
    beginnings_[header.transfer] = beginning;
  } else {
    header.type = Type::kBegin;
    header.slot = key.slot;
    header.generation = key.generation;
    header.kind = kind;
    std::string payload;
    if (kind == SlotKind::kOffer)
      payload = Target{.layout = no_layout(), .num_layers = 1, .scales = {}}.bytes();
    {
      std::lock_guard lock(mutex_);
      header.transfer = next_number_++;
      beginnings_[header.transfer] = beginning;
    }
    status = ask(header, std::move(payload), beginning, deadline_ns);
    header.type = Type::kEnter;
    header.seq = kHeldSeq;
    header.model_layer = model_layer;
    header.model_head = model_head;
    header.num_heads = 1;
    header.count = 1;
  }
  if (status == Status::kOk) status = ask(header, {}, beginning, deadline_ns);
  if (held && status != Status::kOk) held->let_go(false);
  std::lock_guard lock(mutex_);
  beginnings_.erase(header.transfer);
  entered_ = header;
  held_ = held;
  return status;
}

void Link::leave() {
  Header header;
  std::shared_ptr<UcxTransfer> held;
  {
    std::lock_guard lock(mutex_);
    header = entered_;
    held = held_.lock();
    held_.reset();
  }
  if (held) return held->let_go(true);
  header.type = Type::kLeave;
  header.status = Status::kCancelled;
  send(header);
  header.type = Type::kFinish;
  send(header);
}

}  // namespace kvlink::transport::ucx
