// What of a pull has landed here, for operators that read it before all of it has.
#pragma once

#include <memory>

#include "kvlink/base/readiness.hpp"
#include "kvlink/transport/transport.hpp"

namespace kvlink::transport {

class Landing {
 public:
  explicit Landing(size_t num_parts) : rows_(new std::atomic<uint64_t>[num_parts]()) {}

  void add(int32_t part, uint64_t rows);
  // No more rows will come, unless the status is kOk.
  void end(Status status);
  // Ready at `target` rows of the part. Valid as long as this object.
  Readiness readiness(int32_t part, uint64_t target) const;

 private:
  void notify();

  std::unique_ptr<std::atomic<uint64_t>[]> rows_;  // [parts]
  std::atomic<uint64_t> state_{0};                 // as the word of a slot
  std::atomic<uint32_t> changes_{0};
};

}  // namespace kvlink::transport
