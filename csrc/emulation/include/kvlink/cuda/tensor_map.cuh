// kvlink/cuda/tensor_map.cuh for emulation, with the driver's checks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "kvlink/base/check.hpp"

namespace kvlink::cuda {

struct BoxedTensor {
  const void* data;
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
};

struct alignas(64) TensorMap {
  BoxedTensor tensor;
  char rest[24];
};
static_assert(sizeof(TensorMap) == 128);

inline TensorMap make_tensor_map(const BoxedTensor& tensor) {
  bool good = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.box[0] == 64;
  for (int axis = 0; axis < 4; ++axis) {
    good &= tensor.sizes[axis] > 0 && tensor.sizes[axis] <= uint64_t{1} << 32;
    good &= tensor.box[axis] >= 1 && tensor.box[axis] <= 256;
    if (axis < 3)
      good &= tensor.strides[axis] % 16 == 0 && tensor.strides[axis] < uint64_t{1} << 40;
  }
  if (!good) throw std::runtime_error("emulation: no such tensor map");
  return {tensor, {}};
}

}  // namespace kvlink::cuda
