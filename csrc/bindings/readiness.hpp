// Readiness as Python holds it: the counter's address, and what keeps it mapped.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "kvlink/base/readiness.hpp"

namespace kvlink::bindings {

class ReadinessObject {
 public:
  // `readiness` without arrived, waited_ns and name, which are members here.
  ReadinessObject(Readiness readiness, std::string name, std::shared_ptr<void> keep_alive);
  ReadinessObject(const ReadinessObject&) = delete;

  const Readiness& get() const { return readiness_; }
  // The transfer has arrived: ready from now on, whatever becomes of the counter.
  void settle() { arrived_.store(1); }

 private:
  std::string name_;
  std::shared_ptr<void> keep_alive_;
  std::atomic<uint32_t> arrived_{0};
  std::atomic<int64_t> waited_ns_{0};
  Readiness readiness_;
};

using ReadyItems = std::vector<std::shared_ptr<ReadinessObject>>;

std::vector<const Readiness*> to_readiness(const ReadyItems& items);

// Looks for Ctrl-C while it waits. Throws InvalidArgument when `timeout` (seconds) is not >= 0.
ReadyWait make_wait(const std::vector<const Readiness*>& items, double timeout);

}  // namespace kvlink::bindings
