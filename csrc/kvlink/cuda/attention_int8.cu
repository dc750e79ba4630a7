// Attention over int8: of bfloat16 queries, and of others.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> int8_instances() {
  static const Instance kInstances[] = {
      instance<DType::kInt8, 128, 1>(),
      instance<DType::kInt8, 128, 2>(),
      instance<DType::kInt8, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
