// Its longjmp refuses to change stacks.
#undef _FORTIFY_SOURCE

#include "emulation/fiber.hpp"

#include <ucontext.h>

#include <cstdint>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kvlink::emulation {

namespace {

// `fake` keeps the sanitizer's notes of the stack that is left; null: it is left for good.
void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t num_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, num_bytes);
#endif
}

void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** old_stack,
                  [[maybe_unused]] size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, old_stack, old_bytes);
#endif
}

void forget_frames([[maybe_unused]] char* stack, [[maybe_unused]] size_t num_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, num_bytes);
#endif
}

}  // namespace

Fiber::Fiber() : stack_(new char[kStackBytes]) {}

Fiber::~Fiber() { forget_frames(stack_.get(), kStackBytes); }

void Fiber::start(std::function<void()> work) {
  forget_frames(stack_.get(), kStackBytes);
  work_ = std::move(work);
  error_ = nullptr;
  begun_ = done_ = false;
}

// NOTE: contexts make the stack, jumps change it: unlike swapcontext they make no system calls.
void Fiber::resume() {
  if (_setjmp(outside_) == 0) {
    before_switch(&fake_outside_, stack_.get(), kStackBytes);
    if (begun_) _longjmp(inside_, 1);
    begun_ = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Fiber::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    setcontext(&context);
  }
  after_switch(fake_outside_, nullptr, nullptr);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Fiber::suspend() {
  if (_setjmp(inside_) == 0) leave(false);
  after_switch(fake_inside_, &outside_stack_, &outside_bytes_);
}

void Fiber::leave(bool for_good) {
  before_switch(for_good ? nullptr : &fake_inside_, outside_stack_, outside_bytes_);
  _longjmp(outside_, 1);
}

void Fiber::enter(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
  after_switch(nullptr, &self->outside_stack_, &self->outside_bytes_);
  try {
    self->work_();
  } catch (...) {
    self->error_ = std::current_exception();
  }
  self->done_ = true;
  self->leave(true);
}

}  // namespace kvlink::emulation
