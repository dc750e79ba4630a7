#include "kvlink/base/threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvlink/base/check.hpp"

namespace kvlink {

namespace {

int parse_env(const char* name) {
  const char* text = std::getenv(name);
  if (!text || !*text) return 0;
  char* end;
  const long value = std::strtol(text, &end, 10);
  // OMP_NUM_THREADS may be a list, one number a nesting level; the first is ours.
  KVLINK_CHECK(end != text && (*end == '\0' || *end == ',') && value >= 1 && value <= 4096, name,
               ": expected a number of threads in [1, 4096]; got '", text, "'");
  return static_cast<int>(value);
}

int default_num_threads() {
  for (const char* name : {"KVLINK_NUM_THREADS", "OMP_NUM_THREADS"}) {
    if (const int count = parse_env(name)) return count;
  }
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
  return std::max(1u, std::thread::hardware_concurrency());
}

// One parallel_for: workers and the caller take tasks from a counter until none is left.
struct Job {
  Job(const std::function<void(int64_t)>* body, int64_t num_tasks)
      : body(body), num_tasks(num_tasks) {}

  const std::function<void(int64_t)>* body;
  int64_t num_tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers_inside{0};  // changed under Pool::mutex_
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      try {
        (*body)(task);
      } catch (...) {
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(num_tasks, std::memory_order_relaxed);
      }
    }
  }
  bool exhausted() const { return next.load(std::memory_order_relaxed) >= num_tasks; }
};

// Gives way to others, for as long as waking a thread that sleeps may take, until `ready`: one job
// often follows another at once, and its threads end it at nearly the same time.
template <typename Ready>
void linger(const Ready& ready) {
  constexpr auto kTime = std::chrono::microseconds(50);
  const auto end = std::chrono::steady_clock::now() + kTime;
  while (!ready() && std::chrono::steady_clock::now() < end) sched_yield();
}

class Pool {
 public:
  explicit Pool(int num_workers) {
    for (int i = 0; i < num_workers; ++i) workers_.emplace_back([this] { loop(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
      num_posted_.fetch_add(1, std::memory_order_relaxed);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    if (job.workers_inside > 0) {
      lock.unlock();
      linger([&] { return job.workers_inside == 0; });
      lock.lock();
    }
    done_.wait(lock, [&] { return job.workers_inside == 0; });
  }

 private:
  void loop();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> num_posted_{0};
  bool stopping_ = false;
};

thread_local bool inside_task = false;

void Pool::loop() {
  inside_task = true;
  std::unique_lock lock(mutex_);
  while (true) {
    Job* job = nullptr;
    wake_.wait(lock, [&] {
      for (Job* candidate : jobs_) {
        if (!candidate->exhausted()) job = candidate;
      }
      return job || stopping_;
    });
    if (!job) return;
    ++job->workers_inside;
    lock.unlock();
    const uint64_t num_posted = num_posted_.load(std::memory_order_relaxed);
    job->work();
    lock.lock();
    if (--job->workers_inside == 0) done_.notify_all();
    lock.unlock();
    linger([&] { return num_posted_.load(std::memory_order_relaxed) != num_posted; });
    lock.lock();
  }
}

std::mutex settings_mutex;
int configured_threads = 0;
// Shared, so that a parallel_for that is under way keeps the pool it began on. Leaked on purpose:
// no worker is joined at exit, when the interpreter may already be gone.
std::shared_ptr<Pool>& pool_slot() {
  static auto* slot = new std::shared_ptr<Pool>();
  return *slot;
}

// The child of a fork has none of the pool's threads, so it must not touch (or destroy) the old
// one.
void forget_pool_in_child() {
  new std::shared_ptr<Pool>(std::move(pool_slot()));
  pool_slot().reset();
}

std::shared_ptr<Pool> current_pool(int* threads) {
  static const int registered =
      pthread_atfork([] { settings_mutex.lock(); }, [] { settings_mutex.unlock(); },
                     [] {
                       forget_pool_in_child();
                       settings_mutex.unlock();
                     });
  (void)registered;
  std::lock_guard lock(settings_mutex);
  if (configured_threads == 0) configured_threads = default_num_threads();
  *threads = configured_threads;
  if (!pool_slot() && configured_threads > 1) {
    pool_slot() = std::make_shared<Pool>(configured_threads - 1);
  }
  return pool_slot();
}

}  // namespace

int num_threads() {
  std::lock_guard lock(settings_mutex);
  if (configured_threads == 0) configured_threads = default_num_threads();
  return configured_threads;
}

void set_num_threads(int count) {
  KVLINK_CHECK(count >= 1 && count <= 4096, "num_threads: expected 1 to 4096; got ", count);
  std::shared_ptr<Pool> retired;  // joined outside the lock
  std::lock_guard lock(settings_mutex);
  if (count != configured_threads) retired = std::exchange(pool_slot(), nullptr);
  configured_threads = count;
}

bool runs_inline() { return inside_task; }

InlineTasks::InlineTasks() : before_(std::exchange(inside_task, true)) {}

InlineTasks::~InlineTasks() { inside_task = before_; }

void parallel_for(int64_t num_tasks, const std::function<void(int64_t)>& body) {
  if (num_tasks <= 0) return;
  int threads = 1;
  std::shared_ptr<Pool> pool;
  if (num_tasks > 1 && !inside_task) pool = current_pool(&threads);
  if (!pool) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task);
    return;
  }
  Job job(&body, num_tasks);
  inside_task = true;
  pool->run(job);
  inside_task = false;
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace kvlink
