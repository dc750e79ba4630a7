// Attention over float8_e5m2, of any queries.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> float8_e5m2_instances() {
  static const Instance kInstances[] = {
      instance<DType::kFloat8E5M2, 128, 2>(),
      instance<DType::kFloat8E5M2, 256, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
