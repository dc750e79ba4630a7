// The thread of a link, and how it shares its work with the pool's.
#include <pthread.h>

#include <algorithm>
#include <chrono>

#include "kvlink/base/threads.hpp"
#include "kvlink/transport/posting.hpp"

namespace kvlink::transport {

namespace {

// Where threads may move apart, they take the pieces of a round, and wait for each other at its end
// only.
constexpr int64_t kRoundBytes = int64_t{64} << 20;
constexpr int64_t kMinPiece = int64_t{256} << 10, kMaxPiece = int64_t{4} << 20;
constexpr size_t kFirstPieces = 8;                   // of a round, that are small
constexpr int64_t kMinLookBytes = int64_t{1} << 20;  // of a round whose threads look for each other

// Small pieces come last, so that threads end together, and first, so that they soon look for each
// other.
int64_t piece_bytes(size_t num_before, int64_t bytes_left) {
  if (num_before < kFirstPieces) return kMinPiece;
  return std::clamp(bytes_left / (4 * num_threads()), kMinPiece, kMaxPiece);
}

// The threads of a round. Schedulers look for an idle CPU when a thread is woken, and seldom later:
// one that is woken while whoever posted still runs may wait for milliseconds behind another thread
// of the round, although a CPU has become idle. So who is alone sleeps between two pieces until
// another one has come, by which it is woken itself.
class Company {
 public:
  // Whoever is alone sleeps, `tries` times in all.
  explicit Company(int tries) : tries_(tries) {}

  void come() {
    std::lock_guard lock(mutex_);
    arrive();
  }
  void go() {  // nothing is left for others
    std::lock_guard lock(mutex_);
    --present_;
    tries_ = 0;
  }
  void give_way_if_alone() {
    std::unique_lock lock(mutex_);
    if (present_ > 1 || tries_ == 0) return;
    --tries_;
    --present_;
    const uint64_t seen = num_arrivals_;
    if (!changed_.wait_for(lock, kLongest, [&] { return num_arrivals_ != seen; })) tries_ = 0;
    arrive();
  }

 private:
  static constexpr std::chrono::microseconds kLongest{100};

  void arrive() {
    ++present_;
    ++num_arrivals_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int tries_, present_ = 0;
  uint64_t num_arrivals_ = 0;
};

}  // namespace

void Worker::add(const std::shared_ptr<PostedTransfer>& transfer) {
  std::lock_guard lock(mutex_);
  std::erase_if(transfers_, [](const auto& held) { return held.expired(); });
  transfers_.push_back(transfer);
}

void Worker::submit(const std::shared_ptr<PostedTransfer>& transfer,
                    std::span<const Range> ranges) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;  // close() ends the transfer
    for (const Range& range : ranges) {
      jobs_.push_back({transfer, range.part, range.first, range.count});
    }
    if (!thread_.joinable()) {
      thread_ = std::thread([this] { loop(); });
      pthread_setname_np(thread_.native_handle(), "kvlink-link");
    }
  }
  wake_.notify_one();
}

void Worker::loop() {
  while (true) {
    bool woken;
    const std::vector<Job> jobs = take(&woken);
    if (jobs.empty()) return;
    if (jobs.front().part < 0) {
      jobs.front().transfer->complete();
    } else {
      move_all(jobs, woken);
    }
  }
}

std::vector<Worker::Job> Worker::take(bool* woken) {
  std::unique_lock lock(mutex_);
  *woken = jobs_.empty();
  wake_.wait(lock, [&] { return closed_ || !jobs_.empty(); });
  if (closed_) return {};
  const auto moves_apart = [](const Job& job) {
    return job.part >= 0 && job.transfer->moves_apart();
  };
  std::vector<Job> taken;
  if (!moves_apart(jobs_.front())) {
    taken.push_back(std::move(jobs_.front()));
    jobs_.pop_front();
    return taken;
  }
  int64_t bytes_left = 0;
  for (size_t i = 0; i < jobs_.size() && moves_apart(jobs_[i]) && bytes_left < kRoundBytes; ++i) {
    bytes_left += jobs_[i].transfer->dst_bytes(jobs_[i].count);
  }
  bytes_left = std::min(bytes_left, kRoundBytes);
  while (bytes_left > 0) {
    Job& job = jobs_.front();
    const int64_t tokens = job.transfer->tokens_of(piece_bytes(taken.size(), bytes_left));
    taken.push_back(job);
    taken.back().count = std::min(tokens, job.count);
    bytes_left -= job.transfer->dst_bytes(taken.back().count);
    job.first += taken.back().count;
    job.count -= taken.back().count;
    if (job.count == 0) jobs_.pop_front();
  }
  return taken;
}

void Worker::move_all(const std::vector<Job>& jobs, bool woken) {
  const auto move = [&](const Job& job) { job.transfer->move(job.part, job.first, job.count); };
  if (jobs.size() == 1) return move(jobs.front());  // a large one is cut by the operator
  int64_t num_bytes = 0;
  for (const Job& job : jobs) num_bytes += job.transfer->dst_bytes(job.count);
  const bool looks = woken && num_threads() > 1 && num_bytes >= kMinLookBytes;
  Company company(looks ? kFirstPieces : 0);
  std::atomic<size_t> next{0};
  parallel_for(num_threads(), [&](int64_t) {
    company.come();
    for (size_t i; (i = next.fetch_add(1)) < jobs.size();) {
      move(jobs[i]);
      if (next < jobs.size()) company.give_way_if_alone();
    }
    company.go();
  });
}

void Worker::close(Status status) {
  std::deque<Job> jobs;
  std::vector<std::shared_ptr<PostedTransfer>> open;
  std::thread thread;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    jobs.swap(jobs_);
    thread.swap(thread_);
    for (const auto& held : transfers_) {
      if (auto transfer = held.lock()) open.push_back(std::move(transfer));
    }
    transfers_.clear();
  }
  for (const auto& transfer : open) transfer->fail(status);
  wake_.notify_all();
  if (!thread.joinable()) return;
  if (thread.get_id() == std::this_thread::get_id()) {
    thread.detach();  // the last reference was dropped by the worker's own job
  } else {
    thread.join();
  }
}

}  // namespace kvlink::transport
