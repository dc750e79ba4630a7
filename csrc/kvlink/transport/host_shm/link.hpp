// A peer whose control segment is mapped here: its slots, our bit in them, and the thread that
// moves pages.
#pragma once

#include "kvlink/transport/host_shm/transfer.hpp"

namespace kvlink::transport::host_shm {

class Link {
 public:
  // Throws InvalidArgument.
  Link(std::shared_ptr<Control> control, uint32_t bit, const Executor& executor);
  Link(const Link&) = delete;
  ~Link() { close(Status::kCancelled); }

  // Takes the slot; one that cannot be taken is told by *status and gives null. Throws as
  // check_spec.
  std::shared_ptr<PostedTransfer> begin(TransferSpec spec, Status* status);
  // When it returns, this side touches no page of the peer any more.
  void close(Status status) { worker_->close(status); }
  const Control& control() const { return *control_; }
  bool closed() const { return worker_->closed(); }

 private:
  const std::shared_ptr<Control> control_;
  const uint32_t bit_;
  const Executor executor_;
  const std::shared_ptr<Worker> worker_ = std::make_shared<Worker>();
};

}  // namespace kvlink::transport::host_shm
