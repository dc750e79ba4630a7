// Attention over float8_e4m3: of bfloat16 queries, and of others.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> float8_e4m3_instances() {
  static const Instance kInstances[] = {
      instance<DType::kFloat8E4M3, 128, 1>(),
      instance<DType::kFloat8E4M3, 128, 2>(),
      instance<DType::kFloat8E4M3, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
