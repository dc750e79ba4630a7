// Attention over float16: of float16 queries, and of others.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> float16_instances() {
  static const Instance kInstances[] = {
      instance<DType::kFloat16, 64, 1>(),  instance<DType::kFloat16, 128, 1>(),
      instance<DType::kFloat16, 256, 1>(), instance<DType::kFloat16, 128, 2>(),
      instance<DType::kFloat16, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
