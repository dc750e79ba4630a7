#include "emulation/grid.hpp"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/fiber.hpp"

namespace kvlink::emulation {

namespace {

constexpr int kLanes = 32;
constexpr size_t kBlocksAtOnce = 3;
constexpr int kPoison = 0xff;  // NaN, whatever the type

struct Copy {
  void* target;
  const void* source;
  size_t num_bytes;
};

struct Block;

struct Thread {
  Fiber fiber;
  Place place;
  Block* block = nullptr;
  int warp = 0;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

// Lanes on their way to one operation of their warp.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* what = nullptr;
  void* lanes[kLanes] = {};
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::vector<Meeting>> meetings;  // by warp; masks in one are disjoint
  std::vector<Thread*> at_barrier;
  size_t num_running = 0;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, &std::free};
  size_t shared_bytes = 0;
};

class Grid {
 public:
  Grid(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
       uint64_t seed)
      : grid_(grid),
        block_(block),
        shared_bytes_(shared_bytes),
        kernel_(kernel),
        seed_(seed),
        random_(seed) {}

  void run() {
    const size_t grid_size = size_t{grid_.x} * grid_.y * grid_.z;
    std::vector<size_t> order(grid_size);
    for (size_t i = 0; i < grid_size; ++i) order[i] = i;
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
    size_t next = 0;
    while (true) {
      while (next < grid_size && blocks_.size() < kBlocksAtOnce) begin_block(order[next++]);
      if (blocks_.empty()) return;
      if (runnable_.empty()) stuck();
      running = take();
      running->fiber.resume();
      if (running->fiber.done()) end_thread(running);
    }
  }

  void make_runnable(Thread* thread) { runnable_.push_back(thread); }
  bool draw(int one_in) { return seed_ != 0 && random_() % one_in == 0; }

  static Thread* running;

 private:
  void begin_block(size_t idx) {
    std::unique_ptr<Block> block;
    if (spare_.empty()) {
      block = std::make_unique<Block>();
    } else {
      block = std::move(spare_.back());
      spare_.pop_back();
    }
    const unsigned num_threads = block_.x * block_.y * block_.z;
    const auto place_in = [](size_t i, Dim3 in) {
      return Dim3{static_cast<unsigned>(i % in.x), static_cast<unsigned>(i / in.x % in.y),
                  static_cast<unsigned>(i / in.x / in.y)};
    };
    block->num_running = num_threads;
    block->meetings.assign((num_threads + kLanes - 1) / kLanes, {});
    block->shared_bytes = shared_bytes_;
    if (shared_bytes_ > 0) {
      // Of its exact size, so that AddressSanitizer sees accesses past its end.
      void* memory = nullptr;
      if (posix_memalign(&memory, 1024, shared_bytes_) != 0) throw std::bad_alloc();
      std::memset(memory, kPoison, shared_bytes_);
      block->shared.reset(static_cast<char*>(memory));
    }
    block->threads.resize(num_threads);
    for (unsigned i = 0; i < num_threads; ++i) {
      if (!block->threads[i]) block->threads[i] = std::make_unique<Thread>();
      Thread& thread = *block->threads[i];
      thread.place = {place_in(i, block_), place_in(idx, grid_), block_, grid_,
                      static_cast<int>(i) % kLanes};
      thread.block = block.get();
      thread.warp = static_cast<int>(i) / kLanes;
      thread.fiber.start(kernel_);
      make_runnable(&thread);
    }
    blocks_.push_back(std::move(block));
  }

  Thread* take() {
    const size_t at = seed_ == 0 ? 0 : random_() % runnable_.size();
    Thread* thread = runnable_[at];
    if (seed_ == 0) {
      runnable_.pop_front();
    } else {
      std::swap(runnable_[at], runnable_.back());
      runnable_.pop_back();
    }
    return thread;
  }

  void end_thread(Thread* thread) {
    Block* block = thread->block;
    running = thread;
    wait_copies(0);
    if (!thread->open.empty()) {
      commit_copies();
      wait_copies(0);
    }
    --block->num_running;
    if (block->num_running > 0) {
      release_barrier(block);
      return;
    }
    const auto at = std::find_if(blocks_.begin(), blocks_.end(),
                                 [&](const auto& each) { return each.get() == block; });
    spare_.push_back(std::move(*at));
    blocks_.erase(at);
  }

 public:
  // Threads that have ended are not waited for, as on the device.
  void release_barrier(Block* block) {
    if (block->at_barrier.size() < block->num_running) return;
    for (Thread* each : block->at_barrier) make_runnable(each);
    block->at_barrier.clear();
  }

 private:
  [[noreturn]] void stuck() const {
    std::string text = "emulation: no thread can go on;";
    for (const auto& block : blocks_) {
      const Dim3 at = block->threads[0]->place.block_idx;
      text += " block " + std::to_string(at.x) + "," + std::to_string(at.y) + ": " +
              std::to_string(block->at_barrier.size()) + " of " +
              std::to_string(block->num_running) + " threads at __syncthreads";
      for (const auto& warp : block->meetings) {
        for (const Meeting& meeting : warp) {
          text += std::string(", ") + std::to_string(__builtin_popcount(meeting.arrived)) + " of " +
                  std::to_string(__builtin_popcount(meeting.mask)) + " lanes at " + meeting.what;
        }
      }
      text += ";";
    }
    throw std::runtime_error(text);
  }

  Dim3 grid_, block_;
  size_t shared_bytes_;
  const std::function<void()>& kernel_;
  uint64_t seed_;
  std::mt19937_64 random_;
  std::deque<Thread*> runnable_;
  std::vector<std::unique_ptr<Block>> blocks_, spare_;
};

Thread* Grid::running = nullptr;
Grid* current = nullptr;
uint64_t next_seed = 0;

Thread& self() { return *Grid::running; }

void stop() {
  Thread* thread = Grid::running;
  thread->fiber.suspend();
}

void do_copy(const Copy& copy) {
  if (copy.source) {
    std::memcpy(copy.target, copy.source, copy.num_bytes);
  } else {
    std::memset(copy.target, 0, copy.num_bytes);
  }
}

}  // namespace

void set_seed(uint64_t seed) { next_seed = seed; }

void run_grid(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  Grid all(grid, block, shared_bytes, kernel, next_seed);
  current = &all;
  try {
    all.run();
  } catch (...) {
    current = nullptr;
    throw;
  }
  current = nullptr;
}

const Place& place() { return self().place; }

char* shared_memory() { return self().block->shared.get(); }

void check_shared(const void* at, size_t num_bytes, size_t alignment, const char* what) {
  const Block& block = *self().block;
  const auto begin = reinterpret_cast<uintptr_t>(block.shared.get());
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (address < begin || address + num_bytes > begin + block.shared_bytes) {
    throw std::runtime_error(std::string("emulation: ") + what + " outside of shared memory");
  }
  if (address % alignment != 0) {
    throw std::runtime_error(std::string("emulation: ") + what + " is not aligned to " +
                             std::to_string(alignment) + " bytes");
  }
}

void sync_block() {
  Block* block = self().block;
  block->at_barrier.push_back(Grid::running);
  current->release_barrier(block);
  stop();
}

void yield() {
  current->make_runnable(Grid::running);
  stop();
}

void meet_lanes(unsigned mask, const char* what, void* mine, Meet meet) {
  Thread& thread = self();
  const unsigned bit = 1u << thread.place.lane;
  auto& meetings = thread.block->meetings[thread.warp];
  const auto at = std::find_if(meetings.begin(), meetings.end(),
                               [&](const Meeting& each) { return (each.mask & mask) != 0; });
  if ((mask & bit) == 0 || (at != meetings.end() && (at->mask != mask || at->what != what))) {
    throw std::runtime_error(std::string("emulation: the lanes of a warp do not agree on ") + what);
  }
  Meeting& meeting = at == meetings.end() ? meetings.emplace_back() : *at;
  meeting.mask = mask;
  meeting.what = what;
  meeting.arrived |= bit;
  meeting.lanes[thread.place.lane] = mine;
  if (meeting.arrived == mask) {
    const Meeting all = meeting;
    meetings.erase(meetings.begin() + (&meeting - meetings.data()));
    meet(all.lanes);
    const size_t first = static_cast<size_t>(thread.warp) * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask & ~bit) >> lane & 1) {
        current->make_runnable(thread.block->threads[first + lane].get());
      }
    }
    yield();
  } else {
    stop();
  }
}

void copy_later(void* target, const void* source, size_t num_bytes) {
  check_shared(target, num_bytes, num_bytes, "the target of cp.async");
  const Copy copy{target, source, num_bytes};
  if (current->draw(4)) {
    do_copy(copy);
    return;
  }
  std::memset(target, kPoison, num_bytes);  // who does not wait reads NaN
  self().open.push_back(copy);
}

void commit_copies() {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_copies(int groups_left) {
  Thread& thread = self();
  while (static_cast<int>(thread.groups.size()) > groups_left) {
    for (const Copy& copy : thread.groups.front()) do_copy(copy);
    thread.groups.pop_front();
  }
}

}  // namespace kvlink::emulation

extern "C" __attribute__((visibility("default"))) void kvlink_emulation_seed(uint64_t seed) {
  kvlink::emulation::set_seed(seed);
}
