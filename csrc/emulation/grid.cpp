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

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("emulation: " + what); }

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

// In the eight bytes of the barrier itself. Shared memory starts out as ones: not initialised.
struct Phases {
  uint32_t phase : 1, pending : 15, count : 15, uninitialised : 1;
  int32_t bytes;  // announced less copied
};
static_assert(sizeof(Phases) == sizeof(uint64_t));

struct Waiting {
  const Phases* barrier;
  unsigned parity;
  Thread* thread;
};

struct NamedBarrier {
  int num_threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

struct BulkCopy {
  Block* block;
  std::function<void()> copy;
  Phases* barrier;
  size_t num_bytes;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<WarpState>> warps;
  std::vector<Waiting> waiting;
  NamedBarrier named[16];
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
      if (!bulk_copies_.empty() && (runnable_.empty() || draw(8))) {
        finish_bulk_copy();
        continue;
      }
      if (runnable_.empty()) stuck();
      running = take();
      running->fiber.resume();
      if (running->fiber.done()) end_thread(running);
    }
  }

  void make_runnable(Thread* thread) { runnable_.push_back(thread); }
  bool draw(int one_in) { return seed_ != 0 && random_() % one_in == 0; }
  void add_bulk_copy(BulkCopy copy) { bulk_copies_.push_back(std::move(copy)); }

  void end_phase(Block* block, Phases* barrier) {
    if (barrier->pending != 0 || barrier->bytes != 0) return;
    barrier->phase ^= 1;
    barrier->pending = barrier->count;
    const auto ended =
        std::partition(block->waiting.begin(), block->waiting.end(), [&](const Waiting& each) {
          return each.barrier != barrier || each.parity == barrier->phase;
        });
    for (auto each = ended; each != block->waiting.end(); ++each) make_runnable(each->thread);
    block->waiting.erase(ended, block->waiting.end());
  }

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
    block->warps.clear();
    block->warps.resize((num_threads + kLanes - 1) / kLanes);
    for (NamedBarrier& each : block->named) each = {};
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

  void finish_bulk_copy() {
    const size_t at = seed_ == 0 ? 0 : random_() % bulk_copies_.size();
    const BulkCopy copy = std::move(bulk_copies_[at]);
    bulk_copies_.erase(bulk_copies_.begin() + at);
    copy.copy();
    copy.barrier->bytes -= static_cast<int32_t>(copy.num_bytes);
    end_phase(copy.block, copy.barrier);
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
    for (const auto& warp : block->warps) {
      if (warp) warp->check_end();
    }
    for (const BulkCopy& each : bulk_copies_) {
      if (each.block == block) fail("a block ends before its bulk copies");
    }
    for (const NamedBarrier& each : block->named) {
      if (each.arrived > 0) fail("a block ends between two uses of a named barrier");
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
      if (!block->waiting.empty()) {
        text += ", " + std::to_string(block->waiting.size()) + " at barriers in shared memory";
      }
      for (const NamedBarrier& each : block->named) {
        if (each.arrived == 0) continue;
        text += ", " + std::to_string(each.arrived) + " of " + std::to_string(each.num_threads) +
                " threads at barrier " + std::to_string(&each - block->named);
      }
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
  std::vector<BulkCopy> bulk_copies_;
  std::vector<std::unique_ptr<Block>> blocks_, spare_;
};

Thread* Grid::running = nullptr;
Grid* current = nullptr;
uint64_t next_seed = 0;
int current_major_version = 9;
const void* page_locked = nullptr;

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
int major_version() { return current_major_version; }
bool is_page_locked(const void* at) { return at == page_locked; }

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

namespace {

Phases* phases_of(uint64_t* barrier) {
  check_shared(barrier, sizeof(Phases), sizeof(Phases), "a barrier");
  auto* phases = reinterpret_cast<Phases*>(barrier);
  if (phases->uninitialised) fail("a barrier is used before init_barrier");
  return phases;
}

}  // namespace

void init_barrier(uint64_t* barrier, int count) {
  check_shared(barrier, sizeof(Phases), sizeof(Phases), "a barrier");
  auto* phases = reinterpret_cast<Phases*>(barrier);
  *phases = {};
  phases->pending = phases->count = static_cast<unsigned>(count);
}

void arrive(uint64_t* barrier, int expected_bytes) {
  Phases* phases = phases_of(barrier);
  if (phases->pending == 0) fail("more threads arrive at a barrier than its count");
  --phases->pending;
  phases->bytes += expected_bytes;
  current->end_phase(self().block, phases);
  if (current->draw(2)) yield();
}

void wait_phase(uint64_t* barrier, int parity) {
  const Phases* phases = phases_of(barrier);
  if (phases->phase != static_cast<unsigned>(parity)) return;
  self().block->waiting.push_back({phases, static_cast<unsigned>(parity), Grid::running});
  stop();
}

void meet_named(int id, int num_threads, bool waits) {
  if (id < 1 || id > 15 || num_threads % kLanes != 0) fail("no such named barrier");
  NamedBarrier& barrier = self().block->named[id];
  if (barrier.arrived > 0 && barrier.num_threads != num_threads) {
    fail("threads do not agree on how many come to a named barrier");
  }
  barrier.num_threads = num_threads;
  ++barrier.arrived;
  if (waits) barrier.waiting.push_back(Grid::running);
  if (barrier.arrived == num_threads) {
    for (Thread* each : barrier.waiting) current->make_runnable(each);
    barrier = {};
  }
  if (waits) {
    stop();
  } else if (current->draw(2)) {
    yield();
  }
}

void copy_in_bulk(void* target, size_t num_bytes, std::function<void()> copy, uint64_t* barrier) {
  check_shared(target, num_bytes, 128, "the target of a bulk copy");
  std::memset(target, kPoison, num_bytes);
  current->add_bulk_copy({self().block, std::move(copy), phases_of(barrier), num_bytes});
}

WarpState& warp_state(std::unique_ptr<WarpState> (*make)()) {
  auto& state = self().block->warps[self().warp];
  if (!state) state = make();
  return *state;
}

bool draw(int one_in) { return current->draw(one_in); }

}  // namespace kvlink::emulation

extern "C" __attribute__((visibility("default"))) void kvlink_emulation_seed(uint64_t seed) {
  kvlink::emulation::set_seed(seed);
}

extern "C" __attribute__((visibility("default"))) void kvlink_emulation_major_version(int major) {
  kvlink::emulation::current_major_version = major;
}

extern "C" __attribute__((visibility("default"))) void kvlink_emulation_lock_pages(const void* at) {
  kvlink::emulation::page_locked = at;
}
