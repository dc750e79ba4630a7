// Moving pages between pools that are both mapped here.
#pragma once

#include "kvlink/transport/posting.hpp"

namespace kvlink::transport::host_shm {

class ShmTransfer final : public PostedTransfer {
 public:
  // `bit`: this link's, in the peer's slots, which `control` holds.
  ShmTransfer(TransferSpec spec, uint32_t bit, std::shared_ptr<Control> control,
              std::shared_ptr<Worker> worker, const Executor& executor);
  ~ShmTransfer() override;

  Status wait_arrived(int64_t deadline_ns) override;

  bool moves_apart() const override { return true; }

 protected:
  bool move_chunk(int32_t part, int64_t first, int64_t count) override;
  Status finish_moves(std::string* message) override;
  void on_ended(Status status) override;

 private:
  Status enter();
  void leave();

  const uint32_t bit_;
  const std::shared_ptr<Control> control_;
  std::mutex inside_mutex_;
  int num_inside_ = 0;  // threads inside the pages; our bit is set while there are any
};

}  // namespace kvlink::transport::host_shm
