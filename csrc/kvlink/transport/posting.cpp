#include "kvlink/transport/posting.hpp"

#include <algorithm>
#include <utility>

#include "kvlink/base/check.hpp"
#include "kvlink/base/math.hpp"

namespace kvlink::transport {

namespace {

// Bounds how long an owner waits for a writer that runs: the bytes written between enter and leave.
constexpr int64_t kChunkBytes = int64_t{16} << 20;

constexpr Worker::Range kEnd{.part = -1, .first = 0, .count = 0};

int64_t row_bytes(const KVLayout& layout) {
  const int64_t dims = layout.head_dim + (layout.has_v_plane() ? layout.head_dim_v : 0);
  return dims * dtype_bytes(layout.dtype);
}

void check_pages(const char* name, const std::vector<int32_t>& pages, const PoolLayers& pool,
                 int64_t num_tokens) {
  const LayerView& layer = pool.layers.front();
  const int64_t needed = ceil_div(num_tokens, layer.layout.page_size);
  KVLINK_CHECK(static_cast<int64_t>(pages.size()) >= needed, name, ": expected at least ", needed,
               " pages for ", num_tokens, " tokens of page size ", layer.layout.page_size, "; got ",
               pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    if (pages[i] < 0 || pages[i] >= layer.num_pages) {
      throw PageTableError(
          concat(name, "[", i, "]: expected a page in [0, ", layer.num_pages, "); got ", pages[i]));
    }
  }
}

void check_plan(const TransferSpec& spec) {
  const Plan& plan = spec.plan;
  KVLINK_CHECK(!spec.src.layers.empty() && !spec.dst.layers.empty(), "pools: expected layers");
  const auto holds = [](const PoolLayers& pool, int32_t head, int32_t num_heads) {
    return head >= 0 && num_heads > 0 &&
           num_heads <= pool.layers.front().layout.num_kv_heads - head;
  };
  KVLINK_CHECK(holds(spec.src, plan.src_head, plan.num_heads), "plan: heads outside the source");
  KVLINK_CHECK(holds(spec.dst, plan.dst_head, plan.num_heads),
               "plan: heads outside the destination");
  for (const Part& part : plan.parts) {
    KVLINK_CHECK(part.src_layer >= 0 && part.src_layer < std::ssize(spec.src.layers) &&
                     part.dst_layer >= 0 && part.dst_layer < std::ssize(spec.dst.layers),
                 "plan: layers ", part.src_layer, " -> ", part.dst_layer, " outside the pools");
  }
}

}  // namespace

void check_spec(const TransferSpec& spec) {
  KVLINK_CHECK(spec.num_tokens >= 1, "num_tokens: expected at least 1; got ", spec.num_tokens);
  check_plan(spec);
  check_pages("src_pages", spec.src_pages, spec.src, spec.num_tokens);
  check_pages("dst_pages", spec.dst_pages, spec.dst, spec.num_tokens);
}

PostedTransfer::PostedTransfer(TransferSpec spec, std::shared_ptr<Worker> worker,
                               const Executor& executor)
    : spec_(std::move(spec)),
      worker_(std::move(worker)),
      executor_(executor),
      posted_(spec_.plan.parts.size(), 0),
      landing_(spec_.plan.parts.size()) {
  progress_.parts.resize(spec_.plan.parts.size());
  chunk_tokens_ = tokens_of(kChunkBytes);
}

int64_t PostedTransfer::tokens_of(int64_t num_bytes) const {
  const int64_t page_size = spec_.dst.layers.front().layout.page_size;
  return round_up(std::max<int64_t>(1, num_bytes / dst_bytes(1)), page_size);
}

int64_t PostedTransfer::tokens_left(int32_t part) const {
  std::lock_guard lock(mutex_);
  return spec_.num_tokens - posted_.at(part);
}

Readiness PostedTransfer::readiness(int32_t part) const {
  KVLINK_CHECK(spec_.kind == SlotKind::kOffer,
               "readiness: a push lands elsewhere; its receiver asks the grant");
  const KVLayout& layout = spec_.dst.layers.at(spec_.plan.parts.at(part).dst_layer).layout;
  const int64_t planes = layout.has_v_plane() ? 2 : 1;
  return landing_.readiness(part, spec_.plan.num_heads * spec_.num_tokens * planes);
}

void PostedTransfer::post(int32_t part, int64_t num_tokens) {
  int64_t first;
  {
    std::lock_guard lock(mutex_);
    KVLINK_CHECK(part >= 0 && part < std::ssize(posted_), "part: expected below ", posted_.size(),
                 "; got ", part);
    first = posted_[part];
    KVLINK_CHECK(num_tokens >= 1 && num_tokens <= spec_.num_tokens - first,
                 "num_tokens: expected 1 to ", spec_.num_tokens - first, "; got ", num_tokens);
    KVLINK_CHECK(!finishing_, "push_layer: the transfer was finished");
    if (ended_) return;  // the outcome is told by the waits
    posted_[part] += num_tokens;
    if (first == 0) progress_.parts[part].posted_ns = now_ns();
  }
  const Worker::Range range{part, first, num_tokens};
  worker_->submit(shared_from_this(), {&range, 1});
}

void PostedTransfer::post_all() {
  std::vector<Worker::Range> ranges;
  {
    std::lock_guard lock(mutex_);
    if (ended_ || finishing_) return;
    finishing_ = true;
    ranges.reserve(posted_.size() + 1);
    const int64_t now = now_ns();
    for (size_t part = 0; part < posted_.size(); ++part) {
      const int64_t first = std::exchange(posted_[part], spec_.num_tokens);
      if (first == 0) progress_.parts[part].posted_ns = now;
      if (first == spec_.num_tokens) continue;
      ranges.push_back({static_cast<int32_t>(part), first, spec_.num_tokens - first});
    }
  }
  ranges.push_back(kEnd);
  worker_->submit(shared_from_this(), ranges);
}

void PostedTransfer::finish() {
  {
    std::lock_guard lock(mutex_);
    if (ended_ || finishing_) return;
    for (size_t part = 0; part < posted_.size(); ++part) {
      KVLINK_CHECK(posted_[part] == spec_.num_tokens, "finish: of stored source layer ",
                   spec_.plan.parts[part].src_layer, " expected ", spec_.num_tokens,
                   " tokens; got ", posted_[part]);
    }
    finishing_ = true;
  }
  worker_->submit(shared_from_this(), {&kEnd, 1});
}

void PostedTransfer::fail(Status status, const std::string& message) {
  bool asking;
  {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    asking = asking_;
    if (asking) {
      if (failed_meanwhile_ == Status::kPending) failed_meanwhile_ = status;
    } else {
      ended_ = true;
      progress_.status = status;
      progress_.message = message;
    }
  }
  if (asking) return on_failed_meanwhile();
  landing_.end(status);
  on_ended(status);
  changed_.notify_all();
}

bool PostedTransfer::begin_asking() {
  std::lock_guard lock(mutex_);
  asking_ = !ended_;
  return asking_;
}

bool PostedTransfer::enter_chunk() {
  std::lock_guard lock(mutex_);
  if (ended_) return false;
  ++readers_;
  return true;
}

void PostedTransfer::leave_chunk() {
  {
    std::lock_guard lock(mutex_);
    --readers_;
    if (moves_apart() && !(ended_ && readers_ == 0)) return;  // nothing that a wait is for
  }
  changed_.notify_all();
}

void PostedTransfer::hold_source() {
  std::lock_guard lock(mutex_);
  ++readers_;
}

void PostedTransfer::release_source() { leave_chunk(); }

bool PostedTransfer::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

void PostedTransfer::move(int32_t part, int64_t first, int64_t count) {
  {
    std::lock_guard lock(mutex_);
    PartTimes& times = progress_.parts[part];
    if (times.started_ns == 0) times.started_ns = now_ns();
  }
  for (const int64_t end = first + count; first < end;) {
    const int64_t chunk = std::min(chunk_tokens_, end - first);
    if (!enter_chunk()) return;
    const bool moved = move_chunk(part, first, chunk);
    leave_chunk();
    if (!moved) return;
    first += chunk;
  }
}

RelayoutParams PostedTransfer::chunk_params(int32_t part_idx, int64_t first, int64_t count) const {
  const Part& part = spec_.plan.parts[part_idx];
  const LayerView& src = spec_.src.layers[part.src_layer];
  const LayerView& dst = spec_.dst.layers[part.dst_layer];
  // Whole pages are skipped, so that the runs begin inside their first page.
  const auto run = [&](const std::vector<int32_t>& pages, const KVLayout& layout) {
    const int64_t skip = first / layout.page_size;
    return TokenRun{pages.data() + skip, std::ssize(pages) - skip, first % layout.page_size};
  };
  return {.src_layers = &src,
          .dst_layers = &dst,
          .model_layers = &part.model_layer,
          .num_layers = 1,
          .num_heads = spec_.plan.num_heads,
          .src_head = spec_.plan.src_head,
          .dst_head = spec_.plan.dst_head,
          .model_head = spec_.plan.model_head,
          .src = run(spec_.src_pages, src.layout),
          .dst = run(spec_.dst_pages, dst.layout),
          .num_tokens = count,
          .token_position = first,
          .with_digest = spec_.with_digest,
          .whole_bytes = dst_bytes(spec_.num_tokens) * std::ssize(spec_.plan.parts)};
}

int64_t PostedTransfer::dst_bytes(int64_t count) const {
  return count * spec_.plan.num_heads * row_bytes(spec_.dst.layers.front().layout);
}

int64_t PostedTransfer::scale_bytes(int64_t count) const {
  const KVLayout& layout = spec_.dst.layers.front().layout;
  if (layout.scale != ScaleGranularity::kTokenHead) return 0;
  return count * spec_.plan.num_heads * (layout.has_v_plane() ? 2 : 1) * int64_t{sizeof(float)};
}

void PostedTransfer::count_moved(int32_t part, int64_t count, const RelayoutResult& moved,
                                 int64_t started_ns, int64_t done_ns) {
  landing_.add(part, moved.rows);
  std::lock_guard lock(mutex_);
  digest_ += moved.digest;
  progress_.num_rows += moved.rows;
  progress_.num_bytes += dst_bytes(count) + scale_bytes(count);
  // Chunks may be under way together; they end in nearly the order in which they began.
  progress_.moving_ns += std::max<int64_t>(0, done_ns - std::max(started_ns, last_done_ns_));
  last_done_ns_ = std::max(last_done_ns_, done_ns);
  progress_.parts[part].done_ns = std::max(progress_.parts[part].done_ns, done_ns);
}

void PostedTransfer::complete() {
  if (!enter_chunk()) return;
  std::string message;
  Status status = finish_moves(&message);
  {
    std::lock_guard lock(mutex_);
    asking_ = false;
    if (status == Status::kPending) status = failed_meanwhile_;
  }
  leave_chunk();
  if (status == Status::kPending) return;  // the path ends it
  if (status != Status::kOk) return fail(status, message);
  {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = true;
    progress_.status = Status::kOk;
  }
  on_ended(Status::kOk);
  changed_.notify_all();
}

Status PostedTransfer::verify_landed(std::string* message) const {
  if (spec_.plan.parts.empty()) return Status::kOk;  // of a replica without a share
  std::vector<LayerView> layers;
  std::vector<int32_t> model_layers;
  for (const Part& part : spec_.plan.parts) {
    layers.push_back(spec_.dst.layers[part.dst_layer]);
    model_layers.push_back(part.model_layer);
  }
  const int64_t planes = layers.front().layout.has_v_plane() ? 2 : 1;
  const auto rows =
      static_cast<uint64_t>(std::ssize(layers) * spec_.plan.num_heads * spec_.num_tokens * planes);
  uint64_t digest;
  {
    std::lock_guard lock(mutex_);
    if (progress_.num_rows != rows) return Status::kRowCountMismatch;
    digest = digest_;
  }
  if (spec_.with_digest) {
    try {
      const auto landed =
          executor_.digest({.layers = layers.data(),
                            .model_layers = model_layers.data(),
                            .num_layers = static_cast<int32_t>(layers.size()),
                            .num_heads = spec_.plan.num_heads,
                            .head = spec_.plan.dst_head,
                            .model_head = spec_.plan.model_head,
                            .run = {spec_.dst_pages.data(), std::ssize(spec_.dst_pages), 0},
                            .num_tokens = spec_.num_tokens,
                            .token_position = 0});
      if (landed.digest != digest) return Status::kDigestMismatch;
    } catch (const std::exception& error) {
      *message = error.what();
      return Status::kMoveFailed;
    }
  }
  if (!spec_.own) return Status::kOk;
  const OwnPages& own = *spec_.own;
  for (size_t i = 0; i < own.granted.size() && own.generations; ++i) {
    if (own.generations[spec_.dst_pages[i]] != own.granted[i]) return Status::kGenerationMismatch;
  }
  return Status::kOk;
}

bool PostedTransfer::wait_source_reusable(int64_t deadline_ns) {
  std::unique_lock lock(mutex_);
  while (!(ended_ && readers_ == 0)) {
    const int64_t left = deadline_ns - now_ns();
    if (left <= 0) return false;
    changed_.wait_for(lock, std::chrono::nanoseconds(left));
  }
  return true;
}

Progress PostedTransfer::progress() const {
  std::lock_guard lock(mutex_);
  Progress copy = progress_;
  copy.source_reusable = ended_ && readers_ == 0;
  copy.num_moving = readers_;
  return copy;
}

}  // namespace kvlink::transport
