// Attention over latent pages.
#include "kvlink/cuda/attention_instances.cuh"

namespace kvlink::cuda {

std::span<const Instance> latent_instances() {
  static const Instance kInstances[] = {
      latent_instance<DType::kBFloat16, 1>(),   latent_instance<DType::kBFloat16, 2>(),
      latent_instance<DType::kFloat16, 1>(),    latent_instance<DType::kFloat16, 2>(),
      latent_instance<DType::kFloat8E4M3, 1>(), latent_instance<DType::kFloat8E4M3, 2>(),
      latent_instance<DType::kFloat8E5M2, 2>(), latent_instance<DType::kInt8, 2>(),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
