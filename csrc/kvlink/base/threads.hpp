// The one thread pool of the process.
#pragma once

#include <cstdint>
#include <functional>

namespace kvlink {

// Threads used by parallel_for: KVLINK_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs this
// process may run on. A malformed variable is an InvalidArgument at first use.
int num_threads();
void set_num_threads(int count);  // for tests and embedders; count >= 1

// Calls body(task) for every task in [0, num_tasks), on the pool and the calling thread, and
// returns when all are done. The first exception thrown by a body is rethrown here. Which thread
// runs which task is unspecified. Safe to call from several threads; a nested call runs inline.
// After fork() the child starts a fresh pool.
void parallel_for(int64_t num_tasks, const std::function<void(int64_t)>& body);

// On this thread parallel_for runs inline: it is inside a task.
bool runs_inline();

// While one lives, parallel_for runs inline on the thread that made it: for work that is too short
// to wake others for.
class InlineTasks {
 public:
  InlineTasks();
  InlineTasks(const InlineTasks&) = delete;
  InlineTasks& operator=(const InlineTasks&) = delete;
  ~InlineTasks();

 private:
  const bool before_;
};

}  // namespace kvlink
