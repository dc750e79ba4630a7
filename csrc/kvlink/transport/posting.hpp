// What every path's transfers share: parts are posted, one thread per link moves them chunk by
// chunk (where a path allows it, with the pool's threads, a piece each), and both completions are
// told apart.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "kvlink/transport/control.hpp"
#include "kvlink/transport/readiness.hpp"

namespace kvlink::transport {

class PostedTransfer;

// The thread that moves a link's pages. Started by the first job.
class Worker {
 public:
  ~Worker() { close(Status::kCancelled); }

  struct Range {   // tokens of a part
    int32_t part;  // -1: the end
    int64_t first, count;
  };

  // In this order.
  void submit(const std::shared_ptr<PostedTransfer>& transfer, std::span<const Range> ranges);
  // From now on close() ends this transfer, too.
  void add(const std::shared_ptr<PostedTransfer>& transfer);
  // Stops after the chunks under way; every transfer that has not ended ends with `status`. When it
  // returns, no thread of this link touches a page any more.
  void close(Status status);
  bool closed() const { return closed_.load(); }

 private:
  struct Job {
    std::shared_ptr<PostedTransfer> transfer;
    int32_t part;  // -1: the end
    int64_t first, count;
  };

  void loop();
  // Waits for what comes next: one job, or the pieces of several that all threads may move; none
  // when closed. *woken: it had to wait.
  std::vector<Job> take(bool* woken);
  void move_all(const std::vector<Job>& jobs, bool woken);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  std::vector<std::weak_ptr<PostedTransfer>> transfers_;
  std::thread thread_;
  std::atomic<bool> closed_{false};
};

struct TransferSpec {
  SlotKind kind = SlotKind::kGrant;  // what the peer opened: a grant is pushed, an offer pulled
  SlotKey key;
  Plan plan;
  PoolLayers src, dst;  // the peer's may be addresses that only it can follow
  std::vector<int32_t> src_pages, dst_pages;
  int64_t num_tokens = 0;
  bool with_digest = true;
  std::shared_ptr<OwnPages> own;  // pulls: generations and granted of dst_pages
  std::shared_ptr<void> keep_alive;
};

// Checks the pages and the plan against both pools. Throws InvalidArgument or PageTableError.
void check_spec(const TransferSpec& spec);

class PostedTransfer : public Transfer, public std::enable_shared_from_this<PostedTransfer> {
 public:
  PostedTransfer(TransferSpec spec, std::shared_ptr<Worker> worker, const Executor& executor);

  void post(int32_t part, int64_t num_tokens) override;
  void finish() override;
  // All that is left of every part, and finish().
  void post_all();
  void cancel() override { fail(Status::kCancelled); }
  bool wait_source_reusable(int64_t deadline_ns) override;
  Progress progress() const override;

  // Tokens of a part that were not posted yet.
  int64_t tokens_left(int32_t part) const;
  // Pulls: all rows of a part are here, not yet verified. Valid as long as this object.
  Readiness readiness(int32_t part) const;

  // For the worker.
  void move(int32_t part, int64_t first, int64_t count);
  // Whether several threads may be in move() at one time.
  virtual bool moves_apart() const { return false; }
  // Tokens of about so many bytes at the destination, whole pages.
  int64_t tokens_of(int64_t num_bytes) const;
  int64_t dst_bytes(int64_t count) const;  // that `count` tokens of a part take at the destination
  void complete();
  // Ends the work here, once; nothing happens to one that has ended. While the owner of the pages
  // is asked for the outcome, its answer counts more.
  void fail(Status status, const std::string& message = "");

 protected:
  // Moves a chunk, or puts it on its way; false after fail().
  virtual bool move_chunk(int32_t part, int64_t first, int64_t count) = 0;
  // Everything was moved: what is left to do before the work here has ended well.
  virtual Status finish_moves(std::string* message) = 0;
  // The work here has ended; called once, without the lock.
  virtual void on_ended(Status status) = 0;
  // A failure came while the owner is asked: its answer is under way, or will never come.
  virtual void on_failed_meanwhile() {}

  // In finish_moves: from now on the owner is asked for the outcome. False after fail().
  bool begin_asking();

  // A chunk of a part as the executor takes it.
  RelayoutParams chunk_params(int32_t part, int64_t first, int64_t count) const;
  int64_t scale_bytes(int64_t count) const;  // beside dst_bytes
  // Accounts for a chunk that was moved.
  void count_moved(int32_t part, int64_t count, const RelayoutResult& moved, int64_t started_ns,
                   int64_t done_ns);
  // While a path reads source pages after move_chunk has returned, they are not reusable.
  void hold_source();
  void release_source();
  // Pulls: compares what lies in the destination with what was counted.
  Status verify_landed(std::string* message) const;

  bool ended() const;

  const TransferSpec spec_;
  const std::shared_ptr<Worker> worker_;
  const Executor executor_;
  int64_t chunk_tokens_ = 1;

  mutable std::mutex mutex_;
  std::condition_variable changed_;

 private:
  bool enter_chunk();
  void leave_chunk();

  std::vector<int64_t> posted_;  // tokens, of each part
  Progress progress_;
  bool finishing_ = false;  // finish() was called
  bool asking_ = false;     // for the outcome
  bool ended_ = false;      // no further chunk will be moved
  int64_t readers_ = 0;     // chunks that still read the source
  uint64_t digest_ = 0;     // pulls
  int64_t last_done_ns_ = 0;
  Status failed_meanwhile_ = Status::kPending;  // while asking_
  Landing landing_;
};

}  // namespace kvlink::transport
