// What the parts of kvlink._cuda share.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "kvlink/base/check.hpp"
#include "kvlink/cuda/error_record.hpp"
#include "kvlink/cuda/wait_ready.hpp"
#include "pool.hpp"

namespace kvlink::bindings {

// Makes a device current, and gives the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda::check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) cuda::check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  explicit DeviceGuard(const PoolView& pool) : DeviceGuard(cuda_device(pool)) {}
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static int cuda_device(const PoolView& pool) {
    KVLINK_CHECK(pool.device.type == dlpack::kDeviceCuda,
                 "pool: expected one on a CUDA device; got device type ", pool.device.type);
    return pool.device.id;
  }

  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// (counter, target) pairs: an array of one integer on the pool's device, or in host memory that is
// page-locked and mapped, and what it must have reached.
using ReadyItems = std::vector<std::pair<pybind11::object, uint64_t>>;
// `timeout` in seconds. Throws InvalidArgument. The arrays must outlive what waits for them.
cuda::ReadyCounters ready_counters(const ReadyItems& ready, double timeout,
                                   const dlpack::Device& device);

void register_cuda_attention(pybind11::module_& module);
void register_cuda_rope(pybind11::module_& module);
void register_cuda_streams(pybind11::module_& module);

}  // namespace kvlink::bindings
