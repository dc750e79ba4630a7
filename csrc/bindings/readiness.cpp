#include "readiness.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>

#include "kvlink/base/check.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

constexpr double kLongest = 86400.0;  // s

void look_for_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void wait_all(const ReadyItems& ready, double timeout) {
  const auto items = to_readiness(ready);
  const ReadyWait wait = make_wait(items, timeout);
  py::gil_scoped_release nogil;
  wait_ready(wait);
}

}  // namespace

ReadinessObject::ReadinessObject(Readiness readiness, std::string name,
                                 std::shared_ptr<void> keep_alive)
    : name_(std::move(name)), keep_alive_(std::move(keep_alive)), readiness_(readiness) {
  readiness_.arrived = &arrived_;
  readiness_.waited_ns = &waited_ns_;
  readiness_.name = name_.c_str();
}

std::vector<const Readiness*> to_readiness(const ReadyItems& items) {
  std::vector<const Readiness*> found;
  for (const auto& item : items) {
    KVLINK_CHECK(item != nullptr, "ready: expected Readiness objects; got None");
    found.push_back(&item->get());
  }
  return found;
}

ReadyWait make_wait(const std::vector<const Readiness*>& items, double timeout) {
  KVLINK_CHECK(timeout >= 0.0, "ready_timeout: expected seconds >= 0; got ", timeout);
  const std::chrono::nanoseconds now = std::chrono::steady_clock::now().time_since_epoch();
  return {.items = items.data(),
          .num_items = std::ssize(items),
          .deadline_ns = now.count() + static_cast<int64_t>(std::min(timeout, kLongest) * 1e9),
          .on_slice = &look_for_signals};
}

void register_readiness(py::module_& module) {
  py::class_<ReadinessObject, std::shared_ptr<ReadinessObject>>(
      module, "Readiness", "One layer of a transfer that is under way; Grant.readiness makes it.")
      .def_property_readonly(
          "ready", [](const ReadinessObject& self) { return is_ready(self.get()); },
          "All rows of the layer are there, not yet verified. Raises NeverReady.")
      .def_property_readonly(
          "waited_s",
          [](const ReadinessObject& self) {
            return static_cast<double>(self.get().waited_ns->load()) * 1e-9;
          },
          "Seconds that operators and `wait` have waited for it.")
      .def(
          "wait",
          [](const std::shared_ptr<ReadinessObject>& self, double timeout) {
            wait_all({self}, timeout);
          },
          py::arg("timeout"), "Until it is ready. Raises NotReady, NeverReady.")
      .def("settle", &ReadinessObject::settle,
           "For the owner: the transfer has arrived and was verified.");
  module.def("wait_ready", &wait_all, py::arg("ready"), py::arg("timeout"),
             "Until all are ready. Raises NotReady, NeverReady.");
}

}  // namespace kvlink::bindings
