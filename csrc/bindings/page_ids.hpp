// Page ids as users pass them, and the stored layers they page.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "kvlink/params/relayout_pages.hpp"
#include "pool.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

// int32 [n] in host memory, borrowed where the caller's array allows it.
class PageIds {
 public:
  PageIds(const pybind11::object& pages, const std::string& name);

  int64_t size() const { return size_; }
  TokenRun run(int64_t first_slot) const {
    return {.pages = data_, .num_pages = size_, .first_slot = first_slot};
  }

 private:
  std::optional<Tensor> array_;
  std::vector<int32_t> copied_;
  const int32_t* data_ = nullptr;
  int64_t size_ = 0;
};

// Throws InvalidArgument, naming the argument.
std::vector<LayerView> stored_layers(const PoolView& pool, const std::vector<int32_t>& layers,
                                     const char* name);

}  // namespace kvlink::bindings
