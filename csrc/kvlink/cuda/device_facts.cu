#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "kvlink/base/check.hpp"
#include "kvlink/cuda/device_facts.hpp"
#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

namespace {

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

}  // namespace

unsigned num_processors() {
  constexpr int kDevices = 64;  // of which it is remembered
  static std::atomic<int> known[kDevices];
  const int device = current_device();
  int count = device < kDevices ? known[device].load() : 0;
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    if (device < kDevices) known[device].store(count);
  }
  return static_cast<unsigned>(count);
}

void allow_shared_bytes(const char* what, const void* kernel, size_t num_bytes) {
  static std::mutex mutex;
  static auto& allowed = *new std::map<std::pair<const void*, int>, size_t>;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  size_t& known = allowed[{kernel, device}];
  if (known >= num_bytes) return;
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  if (static_cast<size_t>(most) < num_bytes) {
    throw Unsupported(concat(what, ": the kernel needs ", num_bytes,
                             " bytes of shared memory a block; this device has ", most));
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(num_bytes)),
             what);
  known = num_bytes;
}

void load_kernel(const char* what, const void* kernel) {
  static std::mutex mutex;
  static auto& loaded = *new std::set<std::pair<const void*, int>>;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  if (loaded.contains({kernel, device})) return;
  cudaFuncAttributes ignored;
  check_cuda(cudaFuncGetAttributes(&ignored, kernel), what);
  loaded.emplace(kernel, device);
}

}  // namespace kvlink::cuda
