// Small kernels with known outcomes, for the tests of the emulation itself.
#include <map>
#include <string>

#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/ptx.cuh"

namespace kvlink::cuda {

namespace {

constexpr unsigned kThreads = 64;

struct ProbeArgs {
  const float* in;  // [512]
  float* out;       // [128]
};

// Everybody reads what another thread has written.
template <bool kWaits>
__global__ void swap_halves(const __grid_constant__ ProbeArgs args) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = args.in[threadIdx.x];
  if constexpr (kWaits) __syncthreads();
  args.out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

template <bool kWaits>
__global__ void copy_through_shared(const __grid_constant__ ProbeArgs args) {
  auto* shared = reinterpret_cast<float4*>(shared_memory());
  if (threadIdx.x < 16) copy_async(&shared[threadIdx.x], args.in + threadIdx.x * 4, true);
  commit_copies();
  if constexpr (kWaits) wait_copies<0>();
  __syncthreads();
  args.out[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x];
}

__global__ void half_at_the_barrier(const __grid_constant__ ProbeArgs args) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) {
    args.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, args.in[0], 1);
    if (threadIdx.x == 40) __shfl_xor_sync(0xffffffffu, args.in[0], 1);
  }
}

__global__ void past_the_end(const __grid_constant__ ProbeArgs args) {
  uint32_t parts[4];
  load_matrices(parts, shared_memory() + 1024 * threadIdx.x);
  args.out[0] = static_cast<float>(parts[0]);
}

// out [16, 8] = a [16, 16] b [16, 8] by the first warp; with b transposed as it is loaded, or
// before (in holds a, then b as [16, 8], or b transposed as [8, 16]).
template <bool kTransposes>
__global__ void product(const __grid_constant__ ProbeArgs args) {
  auto* a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* b = a + 256;
  for (unsigned i = threadIdx.x; i < 384; i += kThreads) a[i] = bfloat16_from_float(args.in[i]);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a_parts[4], b_parts[4];
  load_matrices(a_parts, a + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (kTransposes) {
    load_matrices_transposed(b_parts, b + lane % 16 * 8);
  } else {
    load_matrices(b_parts, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float c[4] = {};
  multiply_add<DType::kBFloat16>(c, a_parts, b_parts[0], b_parts[1]);
  for (int i = 0; i < 4; ++i) args.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

}  // namespace

}  // namespace kvlink::cuda

// Runs one of the kernels above. Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* kvlink_emulation_probe(
    const char* name, const float* in, float* out) {
  using namespace kvlink::cuda;
  static const std::map<std::string, void (*)(ProbeArgs)> kernels = {
      {"swap", swap_halves<true>},
      {"swap, no barrier", swap_halves<false>},
      {"copy", copy_through_shared<true>},
      {"copy, no wait", copy_through_shared<false>},
      {"half at the barrier", half_at_the_barrier},
      {"past the end", past_the_end},
      {"product", product<false>},
      {"product, transposes", product<true>},
  };
  static std::string error;
  try {
    launch(name, kernels.at(name), dim3(1), kThreads, 1024, nullptr, ProbeArgs{in, out});
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}
