// A function on a stack of its own, which can stop in the middle and go on later.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>

namespace kvlink::emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // What the next resume() begins with; whatever ran before is forgotten.
  void start(std::function<void()> work);
  // Runs until the work suspends or ends. Rethrows what it threw.
  void resume();
  // Called from inside: back to whoever resumed it.
  void suspend();
  bool done() const { return done_; }

 private:
  static void enter(unsigned high, unsigned low);
  void leave(bool for_good);

  static constexpr size_t kStackBytes = 256 << 10;
  std::unique_ptr<char[]> stack_;
  std::function<void()> work_;
  std::exception_ptr error_;
  std::jmp_buf inside_, outside_;
  // For AddressSanitizer, which must know of every change of stacks.
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
  bool begun_ = false, done_ = true;
};

}  // namespace kvlink::emulation
