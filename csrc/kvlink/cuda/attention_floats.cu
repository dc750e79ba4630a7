// Attention over float32: of queries of every float dtype.
#include "kvlink/cuda/attention_instances.cuh"
#include "kvlink/cuda/float_tile.cuh"

namespace kvlink::cuda {

std::span<const Instance> float_instances() {
  static const Instance kInstances[] = {
      extend_instance<FloatTile<128, 128, false>>(DType::kFloat32, true, 128, 128),
      extend_instance<FloatTile<256, 256, false>>(DType::kFloat32, true, 256, 256),
  };
  return kInstances;
}

std::span<const Instance> latent_float_instances() {
  static const Instance kInstances[] = {
      extend_instance<FloatTile<kLatentDim, kLatentDimV, true>>(DType::kFloat32, true, kLatentDim,
                                                                kLatentDimV),
  };
  return kInstances;
}

}  // namespace kvlink::cuda
