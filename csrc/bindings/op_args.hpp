// The arguments of the cache operators as users pass them; the same on every device.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "kvlink/params/append_kv.hpp"
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

// A Rope as Python has it: (cos_sin, positions, interleaved, first_dim), checked; arrays in host
// memory, or wherever they are.
struct RopeArgs {
  RopeArgs(const pybind11::tuple& rope, Symbols& symbols, bool on_host = true);

  Tensor cos_sin, positions;
  RopeParams params;
};

// What append_kv takes, checked against the pool; all arrays must be where the pool is. `layers` is
// one layer, or a sequence of them, which k and v then have an axis more for. `rope` may be None.
struct AppendArgs {
  AppendArgs(const pybind11::object& k, const pybind11::object& v, const PoolView& pool,
             const pybind11::object& layers, const pybind11::object& slots,
             const pybind11::object& rope = pybind11::none());
  AppendArgs(const AppendArgs&) = delete;  // params point into rope

  std::vector<Tensor> arrays;  // keeps what params points to
  std::optional<RopeArgs> rope;
  std::vector<AppendKVParams> params;  // one a layer
};

// Throws InvalidArgument, naming the argument.
std::vector<LayerView> stored_layers(const PoolView& pool, const std::vector<int32_t>& layers,
                                     const char* name);

// The arguments of apply_rope: arrays in host memory, or all on one device.
struct ApplyRopeArgs {
  ApplyRopeArgs(const pybind11::object& x, const pybind11::object& out,
                const pybind11::object& rope, bool on_host);

  Symbols symbols;
  Tensor x, out;
  RopeArgs rope;
  ApplyRopeParams params;
};

}  // namespace kvlink::bindings
