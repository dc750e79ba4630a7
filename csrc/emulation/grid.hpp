// CUDA's execution model on one thread of the host, so that kernels run in tests without a GPU.
//
// Every thread of a grid is a fiber. It runs until it has to wait (a barrier, a shuffle, an atomic)
// and then another one is drawn, by a generator that a test seeds. Two threads between whose
// accesses nothing waits run in either order under some seed: where results differ between seeds,
// there is a race. Several blocks are under way at a time. Shared memory starts out as NaN.
//
// What it cannot show: anything of time or of the memory model (a missing fence, a stale cache),
// races inside of one run between two waits (accesses that interleave there), bank conflicts,
// registers, and the last bits of the hardware's arithmetic (mma.sync, ex2.approx). Launches and
// copies are done when they return, whatever their stream. Of Hopper's instructions it also cannot
// show a missing fence between ordinary and asynchronous accesses (publish_shared).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace kvlink::emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Runs a grid to its end. Throws std::runtime_error when it cannot go on: a barrier that not all
// threads reach, a warp operation that its lanes do not agree on, or what ptx.cuh checks.
void run_grid(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Of the schedule: 0 takes threads in their order, others draw.
void set_seed(uint64_t seed);

// The device's compute capability: 9 at first, or what a test has set.
int major_version();
// Host memory that a test has said is page-locked.
bool is_page_locked(const void* at);

// --- for the thread that runs --------------------------------------------------------------------

struct Place {
  Dim3 thread_idx, block_idx, block_dim, grid_dim;
  int lane = 0;
};
const Place& place();

char* shared_memory();
// Throws unless [at, at + num_bytes) lies in the block's shared memory, aligned to `alignment`.
void check_shared(const void* at, size_t num_bytes, size_t alignment, const char* what);

void sync_block();
// Another thread may run first.
void yield();

// Every lane of `mask` brings `mine`; the last to come calls `meet` with all of them, by lane (null
// for those not in the mask). `what` must agree.
using Meet = void (*)(void* const lanes[32]);
void meet_lanes(unsigned mask, const char* what, void* mine, Meet meet);

// cp.async: done at any time between now and the wait for its group. null source: zeros.
void copy_later(void* target, const void* source, size_t num_bytes);
void commit_copies();
void wait_copies(int groups_left);

// Barriers of eight bytes in shared memory, as those of mbarrier: a phase ends when all have
// arrived and all bytes that they expected have been copied.
void init_barrier(uint64_t* barrier, int count);
void arrive(uint64_t* barrier, int expected_bytes);
void wait_phase(uint64_t* barrier, int parity);

// bar.sync and bar.arrive of barriers 1 to 15.
void meet_named(int id, int num_threads, bool waits);

// A copy that is none of the thread's: `copy` runs at any later time, and then `num_bytes` have
// come to the barrier. The target is NaN until then.
void copy_in_bulk(void* target, size_t num_bytes, std::function<void()> copy, uint64_t* barrier);

// What else is known of a warp, of which `make` makes a new one for every block.
struct WarpState {
  virtual ~WarpState() = default;
  virtual void check_end() const = 0;  // throws when the warp must not end like that
};
WarpState& warp_state(std::unique_ptr<WarpState> (*make)());
bool draw(int one_in);  // by the schedule; never with seed 0

}  // namespace kvlink::emulation
