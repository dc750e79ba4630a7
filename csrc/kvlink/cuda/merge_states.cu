#include <algorithm>

#include "kvlink/base/check.hpp"
#include "kvlink/base/convert.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/merge_states.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kMaxStates = 64;  // their addresses travel with the launch

struct Args {
  const void* outs[kMaxStates];
  const float* lses[kMaxStates];
  void* out;
  float* lse;
  int64_t num_rows;
  int num_states, head_dim;
};

// Grid: a warp for each row. out and lse may be one of the states: a row is read by its own warp
// alone, an element by its own lane, before either is written.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) merge_rows(const __grid_constant__ Args args) {
  using Type = typename Storage<kDType>::Type;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= args.num_rows) return;
  float max = -INFINITY, sum = 0.0f;
  for (int i = 0; i < args.num_states; ++i) {
    if (args.lses[i][row] > max) max = args.lses[i][row];
  }
  for (int i = 0; i < args.num_states; ++i) {
    const float lse = args.lses[i][row];
    if (lse != -INFINITY) sum += expf(lse - max);
  }
  for (int dim = lane; dim < args.head_dim; dim += 32) {
    float total = 0.0f;
    for (int i = 0; i < args.num_states; ++i) {
      const float lse = args.lses[i][row];
      if (lse == -INFINITY) continue;  // has seen nothing, and is not read
      const Type part = static_cast<const Type*>(args.outs[i])[row * args.head_dim + dim];
      total += Storage<kDType>::load(part) * (expf(lse - max) / sum);
    }
    static_cast<Type*>(args.out)[row * args.head_dim + dim] = Storage<kDType>::store(total);
  }
  __syncwarp();
  if (lane == 0) args.lse[row] = sum > 0.0f || sum != sum ? max + logf(sum) : -INFINITY;
}

}  // namespace

void merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  KVLINK_CHECK(params.num_states >= 1, "states: expected at least one; got ", params.num_states);
  if (params.num_states > kMaxStates) {
    throw Unsupported(concat("merge_states on CUDA: supported are up to ", kMaxStates,
                             " states; got ", params.num_states));
  }
  Args args{.outs = {},
            .lses = {},
            .out = params.out,
            .lse = params.lse,
            .num_rows = params.num_tokens * params.num_heads,
            .num_states = static_cast<int>(params.num_states),
            .head_dim = params.head_dim};
  std::copy_n(params.outs, params.num_states, args.outs);
  std::copy_n(params.lses, params.num_states, args.lses);
  if (args.num_rows == 0) return;
  void (*kernel)(Args) = nullptr;
  switch (params.dtype) {
    case DType::kFloat32:
      kernel = merge_rows<DType::kFloat32>;
      break;
    case DType::kFloat16:
      kernel = merge_rows<DType::kFloat16>;
      break;
    case DType::kBFloat16:
      kernel = merge_rows<DType::kBFloat16>;
      break;
    default:
      throw Unsupported(concat("out: supported dtypes are float32, float16, bfloat16; got ",
                               dtype_name(params.dtype)));
  }
  launch("merge_states", kernel,
         dim3(static_cast<unsigned>(ceil_div(args.num_rows, kThreads / 32))), kThreads, 0, stream,
         args);
}

}  // namespace kvlink::cuda
