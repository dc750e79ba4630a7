#include "kvlink/transport/ucx/transfer.hpp"

#include <algorithm>
#include <utility>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/transport/ucx/runs.hpp"

namespace kvlink::transport::ucx {

namespace {

constexpr int64_t kWaitSlice = 50'000'000;    // ns between two looks whether it has ended
constexpr int64_t kAskAgain = 250'000'000;    // ns of silence after which the owner is asked
constexpr int64_t kLastAnswer = 100'000'000;  // ns for an answer that comes after its link's end
constexpr int32_t kFirstPage[] = {0};         // of a staged chunk, which is one page

}  // namespace

std::shared_ptr<UcxTransfer> UcxTransfer::create(std::shared_ptr<Link> link, uint64_t number,
                                                 TransferSpec spec, const Header& reply,
                                                 Terms terms, Status* status) {
  const auto kept = std::make_shared<Terms>(std::move(terms));
  const bool push = spec.kind == SlotKind::kGrant;
  spec.with_digest = reply.with_digest != 0;
  std::vector<LayerView>& theirs = push ? spec.dst.layers : spec.src.layers;
  const KVLayout layout = theirs.front().layout;
  const bool fits = kept->scales.size() == num_shared_scales(layout, theirs.size());
  if (!fits) {
    link->breach("the terms of a slot do not fit its pool");
    *status = Status::kPeerLost;
    return nullptr;
  }
  theirs = scale_layers(layout, theirs.size(), theirs.front().num_pages, kept->scales.data());
  std::vector<uint32_t> numbers;
  if (reply.direct != 0) {
    if (!use_direct_terms(&spec, *kept)) {
      link->breach("the terms of a slot do not fit its pool");
      *status = Status::kPeerLost;
      return nullptr;
    }
    for (const RemoteBlock& block : kept->blocks) numbers.push_back(link->number_of(block));
  }
  return std::make_shared<UcxTransfer>(std::move(link), number, std::move(spec), reply, kept,
                                       std::move(numbers));
}

UcxTransfer::UcxTransfer(std::shared_ptr<Link> link, uint64_t number, TransferSpec spec,
                         const Header& reply, std::shared_ptr<Terms> terms,
                         std::vector<uint32_t> block_numbers)
    : PostedTransfer(std::move(spec), link->worker(), link->hub().executor),
      link_(std::move(link)),
      number_(number),
      direct_(reply.direct != 0),
      terms_(std::move(terms)),
      block_numbers_(std::move(block_numbers)) {
  const KVLayout& layout = spec_.dst.layers.front().layout;
  const auto token = static_cast<int64_t>(staged_bytes(layout, spec_.plan.num_heads, 1));
  if (direct_) return;  // long runs: as many at once as elsewhere
  chunk_tokens_ = std::max<int64_t>(1, static_cast<int64_t>(link_->chunk_bytes()) / token);
  // Chunks end where pages do, if one holds a page.
  if (chunk_tokens_ >= layout.page_size) chunk_tokens_ -= chunk_tokens_ % layout.page_size;
  const LayerView staged =
      staged_view(spec_.dst.layers.front(), spec_.plan.num_heads, 0, chunk_tokens_, nullptr);
  const KVLayout& source = spec_.src.layers.front().layout;
  gathers_ = spec_.kind == SlotKind::kGrant && link_->port().all_pass() &&
             same_bytes(source, staged.layout) &&
             run_bytes(source, staged.layout, spec_.plan.num_heads) >= kDirectBytes;
}

UcxTransfer::~UcxTransfer() {
  cancel();
  link_->forget(number_);
}

// --- messages ------------------------------------------------------------------------------------

Header UcxTransfer::message(Type type) const {
  Header header;
  header.type = type;
  header.slot = spec_.key.slot;
  header.generation = spec_.key.generation;
  header.kind = spec_.kind;
  header.transfer = number_;
  header.with_digest = spec_.with_digest;
  return header;
}

Header UcxTransfer::chunk_message(Type type, uint64_t seq, const Chunk& chunk) const {
  const Plan& plan = spec_.plan;
  const Part& part = plan.parts[chunk.part];
  const bool push = spec_.kind == SlotKind::kGrant;
  Header header = message(type);
  header.seq = seq;
  header.layer = push ? part.dst_layer : part.src_layer;
  header.head = push ? plan.dst_head : plan.src_head;
  header.peer_layer = push ? part.src_layer : part.dst_layer;
  header.peer_head = push ? plan.src_head : plan.dst_head;
  header.model_layer = part.model_layer;
  header.model_head = plan.model_head;
  header.num_heads = plan.num_heads;
  header.first = chunk.first;
  header.count = chunk.count;
  header.rows = chunk.moved.rows;
  header.digest = chunk.moved.digest;
  return header;
}

void UcxTransfer::on_answer(const Header& header) {
  {
    std::lock_guard lock(reply_mutex_);
    heard_ns_ = now_ns();
  }
  if (header.type == Type::kOutcome) return on_outcome(header.status);
  if (header.type == Type::kEntered) return on_entered(header);
  if (header.seq == 0) {  // of kConsume
    {
      std::lock_guard lock(reply_mutex_);
      consumed_ = header.status;
    }
    replied_.notify_all();
    return;
  }
  Chunk chunk;
  if (claim(header.seq, direct_ ? Step::kLeft : Step::kAsked, Step::kMoving, &chunk)) {
    close_chunk(header.seq, chunk, header.status);
  }
}

void UcxTransfer::on_outcome(Status status) {
  if (status == Status::kPending) return;
  // Every row has arrived, ours among them: the answers that are missing were lost, or come last.
  if (status == Status::kOk && spec_.kind == SlotKind::kGrant) close_answered();
  {
    std::lock_guard lock(reply_mutex_);
    heard_ns_ = now_ns();
    if (outcome_ == Status::kPending) outcome_ = status;
  }
  replied_.notify_all();
  // Of an offer: others have pulled it, and our chunks tell of ours.
  if (status != Status::kOk) fail(status);
}

void UcxTransfer::close_answered() {
  std::vector<std::pair<uint64_t, Chunk>> left;
  {
    std::lock_guard lock(reply_mutex_);
    for (const auto& [seq, chunk] : chunks_) {
      if (chunk.step != Step::kMoving) left.emplace_back(seq, chunk);
    }
  }
  for (auto& [seq, chunk] : left) {
    if (claim(seq, chunk.step, Step::kMoving, &chunk)) close_chunk(seq, chunk, Status::kOk);
  }
}

// --- chunks --------------------------------------------------------------------------------------

void UcxTransfer::ask_now_and_then() {
  const int64_t now = now_ns();
  {
    std::lock_guard lock(reply_mutex_);
    if (now - std::max(heard_ns_, asked_ns_) < kAskAgain) return;
    asked_ns_ = now;
  }
  ++link_->counts.asked;
  link_->send(message(Type::kAsk));
}

uint64_t UcxTransfer::open_chunk(const Chunk& chunk) {
  bool waited = false;
  while (!ended()) {
    {
      std::unique_lock lock(reply_mutex_);
      if (!std::exchange(waited, true) && std::ssize(chunks_) >= kWindow)
        ++link_->counts.credit_waits;
      replied_.wait_for(lock, std::chrono::nanoseconds(kWaitSlice),
                        [&] { return std::ssize(chunks_) < kWindow || ended_here_; });
      if (ended_here_) return 0;
      if (std::ssize(chunks_) < kWindow) {
        const uint64_t seq = next_seq_++;
        chunks_[seq] = chunk;
        return seq;
      }
    }
    ask_now_and_then();
  }
  return 0;
}

bool UcxTransfer::claim(uint64_t seq, Step from, Step to, Chunk* chunk) {
  std::lock_guard lock(reply_mutex_);
  const auto found = chunks_.find(seq);
  if (found == chunks_.end() || found->second.step != from) return false;
  found->second.step = to;
  *chunk = found->second;
  return true;
}

// The owner has answered for it, or it has landed here.
void UcxTransfer::close_chunk(uint64_t seq, const Chunk& chunk, Status status) {
  if (status == Status::kOk) {
    count_moved(chunk.part, chunk.count, chunk.moved, chunk.started_ns, now_ns());
  } else {
    fail(status);
  }
  bool last;
  {
    std::lock_guard lock(reply_mutex_);
    chunks_.erase(seq);
    last = draining_ && chunks_.empty();
  }
  if (status != Status::kOk) return finish_if_over();
  replied_.notify_all();
  if (last) fail(Status::kOk);  // ends it: all is well
}

bool UcxTransfer::move_chunk(int32_t part, int64_t first, int64_t count) {
  Chunk chunk{.part = part,
              .first = first,
              .count = count,
              .moved = {},
              .started_ns = 0,
              .step = Step::kAsked,
              .buffer = nullptr};
  if (direct_) return begin_direct(chunk);
  const uint64_t seq = open_chunk(chunk);
  if (seq == 0) return false;
  if (auto pieces = pieces_of(chunk); !pieces.empty()) {
    return gather(seq, chunk, std::move(pieces));
  }
  if (spec_.kind == SlotKind::kGrant) return stage(seq, chunk);
  chunk.started_ns = now_ns();
  {
    std::lock_guard lock(reply_mutex_);
    chunks_[seq] = chunk;
  }
  link_->send(chunk_message(Type::kPull, seq, chunk));
  return true;
}

bool UcxTransfer::stage(uint64_t seq, Chunk chunk) {
  const Part& part = spec_.plan.parts[chunk.part];
  const LayerView& dst = spec_.dst.layers[part.dst_layer];
  const size_t size = staged_bytes(dst.layout, spec_.plan.num_heads, chunk.count);
  std::shared_ptr<Mapping> buffer;
  try {
    if (size > kChunkBytes) buffer = link_->hub().engine->map(nullptr, size);
    while (!buffer && !ended()) {
      buffer = link_->outgoing().take(now_ns() + kWaitSlice);
      if (!buffer) ask_now_and_then();
    }
    if (!buffer) return false;
    const LayerView staged =
        staged_view(dst, spec_.plan.num_heads, spec_.plan.dst_head, chunk.count, buffer->data());
    RelayoutParams params = chunk_params(chunk.part, chunk.first, chunk.count);
    params.dst_layers = &staged;
    params.dst_head = 0;
    params.dst = {kFirstPage, 1, 0};
    params.whole_bytes = 0;  // read again at once: let it stay in the caches
    const std::optional<InlineTasks> inlined = link_->inline_tasks();
    chunk.started_ns = now_ns();
    chunk.moved = executor_.relayout(params);
  } catch (const std::exception& error) {
    fail(Status::kMoveFailed, error.what());
    return false;
  }
  {
    std::lock_guard lock(reply_mutex_);
    if (ended_here_) return false;
    // Until it was answered: what a link has under way is bounded by its buffers.
    chunk.buffer = buffer;
    chunks_[seq] = chunk;
  }
  link_->send_chunk(chunk_message(Type::kChunk, seq, chunk), buffer, size);
  return true;
}

void UcxTransfer::land(const Header& header, const Payload& payload) {
  Chunk chunk;
  if (direct_ || !claim(header.seq, Step::kAsked, Step::kMoving, &chunk)) return;
  const Part& part = spec_.plan.parts[chunk.part];
  const LayerView& dst = spec_.dst.layers[part.dst_layer];
  const int32_t num_heads = spec_.plan.num_heads;
  const uint64_t rows = static_cast<uint64_t>(chunk.count) * num_heads * num_planes(dst.layout);
  const auto bytes = payload.bytes();
  if (bytes.size() != staged_bytes(dst.layout, num_heads, chunk.count) || header.rows != rows) {
    link_->breach(concat("a pulled chunk has ", bytes.size(), " bytes and ", header.rows,
                         " rows for ", chunk.count, " tokens"));
    return close_chunk(header.seq, chunk, Status::kPeerLost);
  }
  // From here on the destination is in use; one that ended before is not touched any more.
  hold_source();
  Status status = Status::kOk;
  std::string why;
  if (!ended()) {
    // Only read.
    const LayerView staged = staged_view(dst, num_heads, spec_.plan.dst_head, chunk.count,
                                         const_cast<std::byte*>(bytes.data()));
    RelayoutParams params = chunk_params(chunk.part, chunk.first, chunk.count);
    params.src_layers = &staged;
    params.src_head = 0;
    params.src = {kFirstPage, 1, 0};
    params.with_digest = false;
    const std::optional<InlineTasks> inlined = link_->inline_tasks();
    try {
      executor_.relayout(params);
    } catch (const std::exception& error) {
      status = Status::kMoveFailed;
      why = error.what();
    }
  }
  release_source();
  if (header.by_reference != 0) {
    Header landed = message(Type::kLanded);
    landed.seq = header.seq;
    link_->send(landed);
  }
  if (status != Status::kOk) fail(status, why);
  chunk.moved = {.rows = header.rows, .digest = header.digest};
  close_chunk(header.seq, chunk, status);
}

// --- ends ----------------------------------------------------------------------------------------

Status UcxTransfer::finish_moves(std::string* message) {
  if (spec_.kind == SlotKind::kGrant) {
    std::lock_guard lock(reply_mutex_);
    draining_ = true;
    return chunks_.empty() ? Status::kOk : Status::kPending;
  }
  while (!ended()) {
    {
      std::unique_lock lock(reply_mutex_);
      replied_.wait_for(lock, std::chrono::nanoseconds(kWaitSlice),
                        [&] { return chunks_.empty() || ended_here_; });
      if (chunks_.empty() || ended_here_) break;
    }
    ask_now_and_then();
  }
  if (ended()) return Status::kPending;
  const Status landed = verify_landed(message);
  return landed == Status::kOk ? consume() : landed;
}

Status UcxTransfer::consume() {
  if (!begin_asking()) return Status::kPending;
  for (bool again = false;; again = true) {
    link_->counts.asked += again;
    link_->send(message(Type::kConsume));
    std::unique_lock lock(reply_mutex_);
    const auto answered = [&] { return consumed_ != Status::kPending; };
    replied_.wait_for(lock, std::chrono::nanoseconds(kAskAgain),
                      [&] { return answered() || failed_here_; });
    // An owner that answers and closes its link at once: both are under way.
    if (failed_here_) replied_.wait_for(lock, std::chrono::nanoseconds(kLastAnswer), answered);
    if (answered() || failed_here_) return consumed_;
  }
}

void UcxTransfer::on_failed_meanwhile() {
  {
    std::lock_guard lock(reply_mutex_);
    failed_here_ = true;
  }
  replied_.notify_all();
}

void UcxTransfer::on_ended(Status status) {
  const bool ours = status == Status::kCancelled || status == Status::kMoveFailed;
  {
    std::lock_guard lock(reply_mutex_);
    ended_here_ = true;
    // What was not begun will not be; what is under way ends by itself.
    std::erase_if(chunks_, [](const auto& entry) { return entry.second.step != Step::kMoving; });
  }
  replied_.notify_all();
  if (ours && spec_.kind == SlotKind::kGrant) {
    Header header = message(Type::kCancel);
    header.status = status;
    link_->send(header);
  }
  finish_if_over();
}

void UcxTransfer::finish_if_over() {
  {
    std::lock_guard lock(reply_mutex_);
    if (!ended_here_ || !chunks_.empty() || told_end_) return;
    told_end_ = true;
  }
  link_->send(message(Type::kFinish));
}

Status UcxTransfer::wait_arrived(int64_t deadline_ns) {
  if (spec_.kind == SlotKind::kOffer) {
    if (!wait_source_reusable(deadline_ns)) return Status::kPending;
    return progress().status;
  }
  while (true) {
    {
      std::unique_lock lock(reply_mutex_);
      if (outcome_ != Status::kPending && outcome_ != Status::kStale) return outcome_;
    }
    // A failure on this side that the owner's slot does not tell.
    const Status local = progress().status;
    if (local != Status::kOk && local != Status::kPending) return local;
    std::unique_lock lock(reply_mutex_);
    if (outcome_ != Status::kPending) return outcome_;
    if (link_->closed() || !link_->failed().empty()) return Status::kPeerLost;
    const int64_t left = deadline_ns - now_ns();
    if (left <= 0) return Status::kPending;
    replied_.wait_for(lock, std::chrono::nanoseconds(std::min(left, kWaitSlice)));
    lock.unlock();
    ask_now_and_then();
  }
}

void UcxTransfer::wait_cancelled(int64_t deadline_ns) {
  const Status status = progress().status;
  if (spec_.kind != SlotKind::kGrant) return;
  if (status != Status::kCancelled && status != Status::kMoveFailed) return;
  std::unique_lock lock(reply_mutex_);
  while (outcome_ == Status::kPending && now_ns() < deadline_ns) {
    replied_.wait_for(lock, std::chrono::nanoseconds(deadline_ns - now_ns()));
  }
}

void UcxTransfer::on_link_closed() { replied_.notify_all(); }

}  // namespace kvlink::transport::ucx
