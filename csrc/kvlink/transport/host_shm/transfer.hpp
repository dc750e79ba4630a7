// Moving pages between mapped pools: one worker thread per link, which works off what was posted.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "kvlink/transport/host_shm/control.hpp"

namespace kvlink::transport::host_shm {

class ShmTransfer;

// The thread that moves a link's pages. Started by the first job.
class Worker {
 public:
  ~Worker() { close(Status::kCancelled); }

  void submit(std::shared_ptr<ShmTransfer> transfer, int32_t part, int64_t first, int64_t count);
  void adopt(const std::shared_ptr<ShmTransfer>& transfer);
  // Stops after the chunk under way; every transfer that has not ended ends with `status`. When it
  // returns, this side touches no page of the peer any more.
  void close(Status status);
  bool closed() const { return closed_.load(); }

 private:
  struct Job {
    std::shared_ptr<ShmTransfer> transfer;
    int32_t part;  // -1: the end
    int64_t first, count;
  };

  void loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  std::vector<std::weak_ptr<ShmTransfer>> transfers_;
  std::thread thread_;
  std::atomic<bool> closed_{false};
};

struct TransferSpec {
  SlotKind kind = SlotKind::kGrant;  // what the peer opened: a grant is pushed, an offer pulled
  SlotKey key;
  uint32_t bit = 0;  // this link's, in the peer's slots
  Plan plan;
  PoolLayers src, dst;
  std::vector<int32_t> src_pages, dst_pages;
  int64_t num_tokens = 0;
  OwnPages own;  // pulls: what to verify (generations and granted; the rest is above)
  std::shared_ptr<void> keep_alive;
};

class ShmTransfer final : public Transfer, public std::enable_shared_from_this<ShmTransfer> {
 public:
  ShmTransfer(TransferSpec spec, std::shared_ptr<Control> control, std::shared_ptr<Worker> worker,
              const Executor& executor);
  ~ShmTransfer() override;

  void post(int32_t part, int64_t num_tokens) override;
  void finish() override;
  void cancel() override;
  bool wait_source_reusable(int64_t deadline_ns) override;
  Status wait_arrived(int64_t deadline_ns) override;
  Progress progress() const override;

  // Tokens of a part that were not posted yet.
  int64_t tokens_left(int32_t part) const;

  // For the worker.
  void move(int32_t part, int64_t first, int64_t count);
  void complete();
  void fail(Status status, const std::string& message = "");

 private:
  bool move_chunk(int32_t part, int64_t first, int64_t count);
  Status verify_pull(std::string* message);
  bool enter_chunk();
  void leave_chunk();

  const TransferSpec spec_;
  const std::shared_ptr<Control> control_;
  const std::shared_ptr<Worker> worker_;
  const Executor executor_;
  const bool with_digest_;
  int64_t chunk_tokens_ = 1;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int64_t> posted_;  // tokens, of each part
  Progress progress_;
  bool finishing_ = false;  // finish() was called
  bool ended_ = false;      // no further chunk will be moved
  bool running_ = false;    // the worker is inside a chunk
  uint64_t digest_ = 0;     // pulls
};

// Checks the pages and the plan against both pools and takes the slot. Throws InvalidArgument or
// PageTableError; a slot that cannot be taken is told by *status and gives null.
std::shared_ptr<ShmTransfer> begin_transfer(TransferSpec spec, std::shared_ptr<Control> control,
                                            std::shared_ptr<Worker> worker,
                                            const Executor& executor, Status* status);

}  // namespace kvlink::transport::host_shm
