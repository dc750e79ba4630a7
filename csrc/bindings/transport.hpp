// What the bindings of transports share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvlink/transport/posting.hpp"
#include "pool.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

using PageArray = py::array_t<int32_t, py::array::c_style>;
using GenerationArray = py::array_t<uint32_t, py::array::c_style>;
using Parts = std::vector<std::array<int32_t, 3>>;  // (src_layer, dst_layer, model_layer)

// The executor of this process: the CPU operators.
extern const transport::Executor kExecutor;

// Waits in slices without the GIL, so that signals are handled. `wait(deadline)` gives kPending.
template <typename Wait>
transport::Status wait_in_slices(int64_t deadline_ns, Wait wait) {
  constexpr int64_t kSignalSlice = 100'000'000;  // ns between two looks for Ctrl-C
  while (true) {
    transport::Status status;
    {
      py::gil_scoped_release release;
      status = wait(std::min(deadline_ns, transport::now_ns() + kSignalSlice));
    }
    if (status != transport::Status::kPending || transport::now_ns() >= deadline_ns) return status;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

// A reference to a Python object that a C++ thread may be the last to drop.
std::shared_ptr<void> hold(py::object object);

inline std::span<const int32_t> to_span(const PageArray& pages) {
  return {pages.data(), static_cast<size_t>(pages.size())};
}

// What a transfer moves, from what Python knows of it. `heads`: (count, first in the source, in the
// destination, in the model). `dst_generations`: of a pull's own pool.
transport::TransferSpec make_spec(transport::SlotKind kind, transport::SlotKey key,
                                  const Parts& parts, std::array<int32_t, 4> heads,
                                  const PoolView& src, const PoolView& dst,
                                  std::span<const int32_t> src_pages,
                                  std::span<const int32_t> dst_pages, int64_t num_tokens,
                                  const std::optional<GenerationArray>& dst_generations);

}  // namespace kvlink::bindings
