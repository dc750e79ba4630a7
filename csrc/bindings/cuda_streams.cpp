#include "cuda_module.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

// An event that is destroyed when the streams are done with it.
class Event {
 public:
  Event() {
    cuda::check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  cudaEvent_t event = nullptr;
};

void order_streams(int device, uintptr_t first, uintptr_t then) {
  if (first == then) return;
  const DeviceGuard guard(device);
  const Event done;
  cuda::check_cuda(cudaEventRecord(done.event, as_stream(first)), "cudaEventRecord");
  cuda::check_cuda(cudaStreamWaitEvent(as_stream(then), done.event, 0), "cudaStreamWaitEvent");
}

}  // namespace

void register_cuda_streams(py::module_& module) {
  module.def("order_streams", &order_streams, py::arg("device"), py::arg("first"), py::arg("then"),
             "What is queued on stream `then` from now on waits for what is queued on `first`.\n\n"
             "Handles; 1 and 2 are the legacy and the per-thread default stream.");
}

}  // namespace kvlink::bindings
