// Attention over bfloat16: of bfloat16 queries, and of others. Each stored dtype has a source of
// its own, since the slowest one to compile decides how long many cores take for all.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> bfloat16_instances() {
  static const Instance kInstances[] = {
      instance<DType::kBFloat16, 64, 1>(),  instance<DType::kBFloat16, 128, 1>(),
      instance<DType::kBFloat16, 256, 1>(), instance<DType::kBFloat16, 128, 2>(),
      instance<DType::kBFloat16, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
