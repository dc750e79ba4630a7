// What a bulk copy must know of the tensor it copies boxes of. csrc/emulation has its own.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kvlink/base/check.hpp"
#include "kvlink/cuda/error_record.hpp"

namespace kvlink::cuda {

using TensorMap = CUtensorMap;  // a kernel's argument, aligned to 64 bytes

// Axes innermost first; that one is contiguous, of elements of 16 bits.
struct BoxedTensor {
  const void* data;     // aligned to 16 bytes
  uint64_t sizes[4];    // elements
  uint64_t strides[3];  // bytes, of axes 1 to 3; multiples of 16
  uint32_t box[4];      // elements; box[0] is 64, so that a row of a box has 128 bytes
};

// Boxes get the swizzle that ptx.cuh's products expect. Throws CudaError.
inline TensorMap make_tensor_map(const BoxedTensor& tensor) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    return reinterpret_cast<Encode>(found);
  }();
  if (!encode) throw Unsupported("the driver has no cuTensorMapEncodeTiled");
  constexpr uint32_t kEach[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult status = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(tensor.data), tensor.sizes,
      tensor.strides, tensor.box, kEach, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    check_cuda(cudaErrorInvalidValue, "cuTensorMapEncodeTiled");
  }
  return map;
}

}  // namespace kvlink::cuda
