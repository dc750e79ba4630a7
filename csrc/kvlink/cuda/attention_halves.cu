// Attention over bfloat16 and float16: of queries of the same dtype, and of others.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> half_instances() {
  static const Instance kInstances[] = {
      instance<DType::kBFloat16, 64, 1>(),  instance<DType::kBFloat16, 128, 1>(),
      instance<DType::kBFloat16, 256, 1>(), instance<DType::kFloat16, 64, 1>(),
      instance<DType::kFloat16, 128, 1>(),  instance<DType::kFloat16, 256, 1>(),
      instance<DType::kBFloat16, 128, 2>(), instance<DType::kBFloat16, 256, 2>(),
      instance<DType::kFloat16, 128, 2>(),  instance<DType::kFloat16, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
