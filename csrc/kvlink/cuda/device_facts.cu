#include <atomic>
#include <map>
#include <mutex>
#include <utility>

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
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(num_bytes)),
             what);
  known = num_bytes;
}

}  // namespace kvlink::cuda
