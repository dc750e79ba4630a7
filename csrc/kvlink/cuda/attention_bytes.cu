// Attention over float8 and int8: of bfloat16 queries, and of others.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> byte_instances() {
  static const Instance kInstances[] = {
      instance<DType::kFloat8E4M3, 128, 1>(), instance<DType::kFloat8E4M3, 128, 2>(),
      instance<DType::kFloat8E4M3, 256, 2>(), instance<DType::kFloat8E5M2, 128, 2>(),
      instance<DType::kFloat8E5M2, 256, 2>(), instance<DType::kInt8, 128, 1>(),
      instance<DType::kInt8, 128, 2>(),       instance<DType::kInt8, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
