#include "kvlink/transport/host_shm/link.hpp"

#include "kvlink/base/check.hpp"

namespace kvlink::transport::host_shm {

Link::Link(std::shared_ptr<Control> control, uint32_t bit, const Executor& executor)
    : control_(std::move(control)), bit_(bit), executor_(executor) {
  KVLINK_CHECK(bit < kMaxLinks, "bit: expected below ", kMaxLinks, "; got ", bit);
}

std::shared_ptr<PostedTransfer> Link::begin(TransferSpec spec, Status* status) {
  check_spec(spec);
  *status = closed() ? Status::kPeerLost : control_->begin(spec.key, bit_);
  if (*status != Status::kOk) return nullptr;
  spec.with_digest = control_->slot(spec.key.slot).with_digest.load() != 0;
  const auto transfer =
      std::make_shared<ShmTransfer>(std::move(spec), bit_, control_, worker_, executor_);
  worker_->add(transfer);
  return transfer;
}

}  // namespace kvlink::transport::host_shm
