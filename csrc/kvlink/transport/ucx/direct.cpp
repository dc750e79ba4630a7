// Chunks that are not packed. Direct: the owner pins, puts or gets move the runs, the owner unpins.
// Gathered: sent from where the runs lie.
#include "kvlink/base/check.hpp"
#include "kvlink/layout/rows.hpp"
#include "kvlink/transport/ucx/runs.hpp"
#include "kvlink/transport/ucx/transfer.hpp"

namespace kvlink::transport::ucx {

bool direct_pays(const TransferSpec& spec, int64_t least_bytes) {
  const KVLayout& src = spec.src.layers.front().layout;
  const KVLayout& dst = spec.dst.layers.front().layout;
  return same_bytes(src, dst) && run_bytes(src, dst, spec.plan.num_heads) >= least_bytes;
}

bool use_direct_terms(TransferSpec* spec, const Terms& terms) {
  const bool push = spec->kind == SlotKind::kGrant;
  std::vector<LayerView>& theirs = push ? spec->dst.layers : spec->src.layers;
  if (terms.planes.size() != 2 * theirs.size() || terms.blocks.empty()) return false;
  for (size_t i = 0; i < theirs.size(); ++i) {
    theirs[i].k = reinterpret_cast<void*>(terms.planes[2 * i]);
    theirs[i].v = reinterpret_cast<void*>(terms.planes[2 * i + 1]);
  }
  (push ? spec->dst_pages : spec->src_pages) = terms.pages;
  try {
    check_spec(*spec);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

bool UcxTransfer::digest_source(Chunk* chunk) {
  if (!spec_.with_digest) return true;
  const Part& part = spec_.plan.parts[chunk->part];
  const RelayoutParams params = chunk_params(chunk->part, chunk->first, chunk->count);
  try {
    chunk->moved.digest = executor_
                              .digest({.layers = params.src_layers,
                                       .model_layers = &part.model_layer,
                                       .num_layers = 1,
                                       .num_heads = params.num_heads,
                                       .head = params.src_head,
                                       .model_head = params.model_head,
                                       .run = params.src,
                                       .num_tokens = params.num_tokens,
                                       .token_position = params.token_position})
                              .digest;
  } catch (const std::exception& error) {
    fail(Status::kMoveFailed, error.what());
    return false;
  }
  return true;
}

std::vector<ucp_dt_iov_t> UcxTransfer::pieces_of(const Chunk& chunk) const {
  if (!gathers_ || link_->has_fault(Fault::kFlipBit)) return {};  // no fault may alter the source
  const LayerView& dst = spec_.dst.layers[spec_.plan.parts[chunk.part].dst_layer];
  const int32_t num_heads = spec_.plan.num_heads;
  const LayerView staged = staged_view(dst, num_heads, spec_.plan.dst_head, chunk.count, nullptr);
  constexpr int32_t kFirstPage[] = {0};
  RelayoutParams params = chunk_params(chunk.part, chunk.first, chunk.count);
  params.dst_layers = &staged;
  params.dst_head = 0;
  params.dst = {kFirstPage, 1, 0};
  std::vector<ucp_dt_iov_t> pieces;
  size_t total = 0;
  for (const RemoteRun& run : cut_runs(params, true)) {
    if (run.remote != total || pieces.size() == kMaxPieces) return {};
    pieces.push_back({.buffer = run.local, .length = run.size});
    total += run.size;
  }
  if (total != staged_bytes(dst.layout, num_heads, chunk.count)) return {};
  return pieces;
}

bool UcxTransfer::gather(uint64_t seq, Chunk chunk, std::vector<ucp_dt_iov_t> pieces) {
  const LayerView& source = spec_.src.layers[spec_.plan.parts[chunk.part].src_layer];
  chunk.started_ns = now_ns();
  chunk.moved.rows =
      static_cast<uint64_t>(chunk.count) * spec_.plan.num_heads * num_planes(source.layout);
  {
    const std::optional<InlineTasks> inlined = link_->inline_tasks();
    if (!digest_source(&chunk)) return false;
  }
  // NOTE: before the look whether it has ended, so that whoever ends it waits for what starts here.
  hold_source();
  bool over;
  {
    std::lock_guard lock(reply_mutex_);
    over = ended_here_;
    if (!over) chunks_[seq] = chunk;
  }
  if (over) {
    release_source();
    return false;
  }
  ++link_->counts.gathered;
  const auto self = std::static_pointer_cast<UcxTransfer>(shared_from_this());
  size_t size = 0;
  for (const ucp_dt_iov_t& piece : pieces) size += piece.length;
  link_->send(chunk_message(Type::kChunk, seq, chunk),
              {.header = {},
               .data = nullptr,
               .size = size,
               .mapping = nullptr,
               .keep = self,
               .pieces = std::move(pieces)},
              [self](ucs_status_t) { self->release_source(); });
  return true;
}

bool UcxTransfer::begin_direct(Chunk chunk) {
  const bool push = spec_.kind == SlotKind::kGrant;
  const Part& part = spec_.plan.parts[chunk.part];
  const LayerView& source = spec_.src.layers[part.src_layer];
  chunk.started_ns = now_ns();
  chunk.moved.rows =
      static_cast<uint64_t>(chunk.count) * spec_.plan.num_heads * num_planes(source.layout);
  if (push && !digest_source(&chunk)) return false;
  const uint64_t seq = open_chunk(chunk);
  if (seq == 0) return false;
  link_->send(chunk_message(Type::kEnter, seq, chunk));
  return true;
}

// The pages are pinned for us, or why not.
void UcxTransfer::on_entered(const Header& header) {
  Chunk chunk;
  // NOTE: before the look whether it has ended, so that whoever ends it waits for what starts here.
  hold_source();
  const bool ours = claim(header.seq, Step::kAsked, Step::kMoving, &chunk);
  if (!ours || header.status != Status::kOk || ended()) {
    release_source();
    if (!ours && header.status == Status::kOk) {
      // Nobody waits for it any more; nothing was touched.
      Header left = header;
      left.type = Type::kLeave;
      left.status = Status::kCancelled;
      link_->send(left);
    }
    if (!ours) return;
    if (header.status != Status::kOk) {
      close_chunk(header.seq, chunk, header.status);
    } else {
      leave(header.seq, chunk, Status::kCancelled);
    }
    return;
  }
  const bool push = spec_.kind == SlotKind::kGrant;
  if (!push) chunk.moved = {.rows = header.rows, .digest = header.digest};
  std::vector<RemoteRun> runs;
  try {
    runs = find_runs(chunk_params(chunk.part, chunk.first, chunk.count), push, terms_->blocks,
                     block_numbers_);
  } catch (const std::exception& error) {
    release_source();
    leave(header.seq, chunk, Status::kCancelled);
    return fail(Status::kMoveFailed, error.what());
  }
  const auto self = std::static_pointer_cast<UcxTransfer>(shared_from_this());
  const Done done = [self, chunk, seq = header.seq](ucs_status_t status) {
    self->release_source();
    self->leave(seq, chunk, status == UCS_OK ? Status::kOk : Status::kPeerLost);
  };
  ++link_->counts.direct;
  if (push) {
    link_->port().put(std::move(runs), self, done);
  } else {
    link_->port().get(std::move(runs), self, done);
  }
}

// Tells the owner that nothing of this chunk is under way any more.
void UcxTransfer::leave(uint64_t seq, const Chunk& chunk, Status status) {
  Chunk left = chunk;
  {
    std::lock_guard lock(reply_mutex_);
    const auto found = chunks_.find(seq);
    if (found == chunks_.end()) return;
    found->second = left;
    found->second.step = Step::kLeft;
  }
  Header header = chunk_message(Type::kLeave, seq, left);
  header.status = status;
  link_->send(header);
  if (status == Status::kPeerLost) return fail(status);
  bool over;
  {
    std::lock_guard lock(reply_mutex_);
    over = ended_here_;
    if (over) chunks_.erase(seq);
  }
  if (over) finish_if_over();
}

}  // namespace kvlink::transport::ucx
