#include "kvlink/transport/host_shm/transfer.hpp"

namespace kvlink::transport::host_shm {

ShmTransfer::ShmTransfer(TransferSpec spec, uint32_t bit, std::shared_ptr<Control> control,
                         std::shared_ptr<Worker> worker, const Executor& executor)
    : PostedTransfer(std::move(spec), std::move(worker), executor),
      bit_(bit),
      control_(std::move(control)) {}

ShmTransfer::~ShmTransfer() { cancel(); }

Status ShmTransfer::enter() {
  std::lock_guard lock(inside_mutex_);
  const Status status =
      num_inside_ > 0 ? control_->may_enter(spec_.key) : control_->enter(spec_.key, bit_);
  if (status == Status::kOk) ++num_inside_;
  return status;
}

void ShmTransfer::leave() {
  std::lock_guard lock(inside_mutex_);
  if (--num_inside_ == 0) control_->leave(spec_.key, bit_);
}

bool ShmTransfer::move_chunk(int32_t part, int64_t first, int64_t count) {
  if (const Status status = enter(); status != Status::kOk) {
    fail(status);
    return false;
  }
  RelayoutResult moved;
  const int64_t started = now_ns();
  try {
    moved = executor_.relayout(chunk_params(part, first, count));
  } catch (const std::exception& error) {
    leave();
    fail(Status::kMoveFailed, error.what());
    return false;
  }
  // NOTE: counted before the owner can see it: whoever learns of the arrival finds all of it.
  count_moved(part, count, moved, started, now_ns());
  if (spec_.kind == SlotKind::kGrant) {
    control_->add_rows(spec_.key, spec_.plan.parts[part].dst_layer, moved);
  }
  leave();
  return true;
}

Status ShmTransfer::finish_moves(std::string* message) {
  if (spec_.kind == SlotKind::kGrant) return Status::kOk;
  // The offer held while we read: nobody reused its pages, since ours was the bit inside them.
  const Status held = control_->status(spec_.key);
  if (held != Status::kPending) return held == Status::kOk ? Status::kStale : held;
  const Status landed = verify_landed(message);
  if (landed != Status::kOk) return landed;
  return begin_asking() ? control_->consume(spec_.key) : Status::kPending;
}

void ShmTransfer::on_ended(Status status) {
  // A grant without one of its writers cannot complete. An offer stays for the next reader.
  const bool ours = status == Status::kCancelled || status == Status::kMoveFailed;
  if (spec_.kind == SlotKind::kGrant && ours) control_->close(spec_.key, status);
  control_->finish(spec_.key, bit_);
}

Status ShmTransfer::wait_arrived(int64_t deadline_ns) {
  if (spec_.kind == SlotKind::kOffer) {
    if (!wait_source_reusable(deadline_ns)) return Status::kPending;
    return progress().status;
  }
  const Status outcome = control_->wait_closed(spec_.key, worker_->closed() ? 0 : deadline_ns);
  if (outcome != Status::kPending && outcome != Status::kStale) return outcome;
  // A failure on this side that the owner's slot does not tell.
  const Status local = progress().status;
  if (local != Status::kOk && local != Status::kPending) return local;
  if (outcome == Status::kPending && worker_->closed()) return Status::kPeerLost;
  return outcome;
}

}  // namespace kvlink::transport::host_shm
