// What kvlink's CUDA sources use of CUDA, for the host compiler. Found before the toolkit's header
// of this name when the kernels are compiled for emulation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "emulation/grid.hpp"
#include "emulation/streams.hpp"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__

#define CUDART_VERSION 0

#define threadIdx (::kvlink::emulation::place().thread_idx)
#define blockIdx (::kvlink::emulation::place().block_idx)
#define blockDim (::kvlink::emulation::place().block_dim)
#define gridDim (::kvlink::emulation::place().grid_dim)

// --- types ---------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 : kvlink::emulation::Dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Dim3{x, y, z} {}
};

// --- device functions ----------------------------------------------------------------------------

inline void __syncthreads() { kvlink::emulation::sync_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  kvlink::emulation::meet_lanes(mask, "__syncwarp", nullptr, [](void* const*) {});
}

namespace kvlink::emulation {

template <typename T>
struct Exchange {
  T value;
  int from;
  T result;

  static void meet(void* const lanes[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* mine = static_cast<Exchange*>(lanes[lane]);
      if (!mine) continue;
      const auto* other = static_cast<const Exchange*>(lanes[mine->from]);
      mine->result = other ? other->value : T{};  // undefined on the device
    }
  }
};

template <typename T>
T exchange(unsigned mask, const char* what, T value, int from) {
  Exchange<T> mine{value, from, value};
  meet_lanes(mask, what, &mine, &Exchange<T>::meet);
  return mine.result;
}

struct Vote {
  bool vote;
  unsigned result;

  static void meet(void* const lanes[32]) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const auto* mine = static_cast<const Vote*>(lanes[lane]);
      if (mine && mine->vote) votes |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane]) static_cast<Vote*>(lanes[lane])->result = votes;
    }
  }
};

}  // namespace kvlink::emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = kvlink::emulation::place().lane;
  const int from = lane ^ lane_mask;
  return kvlink::emulation::exchange(mask, "__shfl_xor_sync", value,
                                     from / width == lane / width ? from : lane);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = kvlink::emulation::place().lane;
  return kvlink::emulation::exchange(mask, "__shfl_sync", value,
                                     lane / width * width + (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = kvlink::emulation::place().lane;
  const int from = lane - static_cast<int>(delta);
  return kvlink::emulation::exchange(mask, "__shfl_up_sync", value,
                                     from >= lane / width * width ? from : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  kvlink::emulation::Vote mine{vote, 0};
  kvlink::emulation::meet_lanes(mask, "__ballot_sync", &mine, &kvlink::emulation::Vote::meet);
  return mine.result;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }

template <typename T>
T atomicAdd(T* at, T value) {
  kvlink::emulation::yield();
  const T before = *at;
  *at = before + value;
  return before;
}

template <typename T>
T atomicMax(T* at, T value) {
  kvlink::emulation::yield();
  const T before = *at;
  if (value > before) *at = value;
  return before;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }

// Byte i of the result: byte (selector >> 4 i) % 8 of the eight of a, then b.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(all >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}

// --- the runtime ---------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess,
  cudaErrorMemoryAllocation,
  cudaErrorNoDevice,
  cudaErrorInsufficientDriver,
  cudaErrorNotReady
};  // NOLINT
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost };
struct cudaPointerAttributes {
  cudaMemoryType type;
  void* devicePointer;
};
struct cudaFuncAttributes {};
using cudaStream_t = struct CUstream_st*;
#define cudaStreamPerThread (reinterpret_cast<cudaStream_t>(uintptr_t{2}))

inline constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
struct CUevent_st {
  cudaStream_t stream = nullptr;
  bool recorded = false;
};
using cudaEvent_t = CUevent_st*;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new CUevent_st, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return *event = {stream, true}, cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  const auto number = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(event->stream));
  return event->recorded && kvlink::emulation::is_busy(number) ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
// A test says that a graph captures by the number of its stream.
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  constexpr uintptr_t kCaptures = 0xca9;
  *status = reinterpret_cast<uintptr_t>(stream) == kCaptures ? cudaStreamCaptureStatusActive
                                                             : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return *id = reinterpret_cast<uintptr_t>(stream), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 2
           : attribute == cudaDevAttrComputeCapabilityMajor ? kvlink::emulation::major_version()
                                                            : 227 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* at) {
  const bool locked = kvlink::emulation::is_page_locked(at);
  *found = {locked ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered, const_cast<void*>(at)};
  return cudaSuccess;
}

// Of exactly that size, and full of NaN.
inline cudaError_t cudaMallocAsync(void** memory, size_t num_bytes, cudaStream_t) {
  if (posix_memalign(memory, 256, num_bytes) != 0) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, num_bytes);
  kvlink::emulation::count_allocation();
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  kvlink::emulation::count_free();
  return std::free(memory), cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t num_bytes, unsigned) {
  return cudaMallocAsync(memory, num_bytes, nullptr);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return std::memcpy(to, from, num_bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t num_bytes, cudaStream_t) {
  return std::memset(memory, value, num_bytes), cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
