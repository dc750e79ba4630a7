#include <algorithm>
#include <optional>

#include "kvlink/base/check.hpp"
#include "kvlink/base/convert.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cuda/launch.cuh"
#include "kvlink/cuda/merge_states.hpp"
#include "kvlink/cuda/scratch.hpp"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kLaunchStates = 64;  // whose addresses travel with a launch

struct Partial {
  const void* out;
  const float* lse;
};

struct Args {
  Partial states[kLaunchStates];
  const Partial* listed;  // all of them, where there are more than that; else null
  void* out;
  float* lse;
  int64_t num_rows;
  int num_states, head_dim;
};

struct ListArgs {
  Partial states[kLaunchStates];
  Partial* listed;
  int num_states;
};

// One block: the addresses that came with the launch, in memory of the device.
__global__ void __launch_bounds__(kLaunchStates)
    list_states(const __grid_constant__ ListArgs args) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < args.num_states) args.listed[i] = args.states[i];
}

// Grid: a warp for each row. out and lse may be one of the states: a row is read by its own warp
// alone, an element by its own lane, before either is written.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) merge_rows(const __grid_constant__ Args args) {
  using Type = typename Storage<kDType>::Type;
  const auto state = [&](int i) { return args.listed ? args.listed[i] : args.states[i]; };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= args.num_rows) return;
  float max = -INFINITY, sum = 0.0f;
  for (int i = 0; i < args.num_states; ++i) {
    const float lse = state(i).lse[row];
    if (lse > max) max = lse;
  }
  for (int i = 0; i < args.num_states; ++i) {
    const float lse = state(i).lse[row];
    if (lse != -INFINITY) sum += expf(lse - max);
  }
  for (int dim = lane; dim < args.head_dim; dim += 32) {
    float total = 0.0f;
    for (int i = 0; i < args.num_states; ++i) {
      const Partial from = state(i);
      const float lse = from.lse[row];
      if (lse == -INFINITY) continue;  // has seen nothing, and is not read
      const Type part = static_cast<const Type*>(from.out)[row * args.head_dim + dim];
      total += Storage<kDType>::load(part) * (expf(lse - max) / sum);
    }
    static_cast<Type*>(args.out)[row * args.head_dim + dim] = Storage<kDType>::store(total);
  }
  __syncwarp();
  if (lane == 0) args.lse[row] = sum > 0.0f || sum != sum ? max + logf(sum) : -INFINITY;
}

void copy_states(const MergeStatesParams& params, int64_t first, int count, Partial* to) {
  for (int i = 0; i < count; ++i) to[i] = {params.outs[first + i], params.lses[first + i]};
}

// By as many launches as it takes: unlike a copy from the host, a graph may capture them.
void list_all(const MergeStatesParams& params, Partial* listed, cudaStream_t stream) {
  for (int64_t first = 0; first < params.num_states; first += kLaunchStates) {
    ListArgs args{.states = {}, .listed = listed + first, .num_states = 0};
    args.num_states = static_cast<int>(std::min<int64_t>(params.num_states - first, kLaunchStates));
    copy_states(params, first, args.num_states, args.states);
    launch("merge_states: list", list_states, dim3(1), kLaunchStates, 0, stream, args);
  }
}

}  // namespace

void merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  KVLINK_CHECK(params.num_states >= 1 && params.num_states <= INT32_MAX,
               "states: expected at least one; got ", params.num_states);
  Args args{.states = {},
            .listed = nullptr,
            .out = params.out,
            .lse = params.lse,
            .num_rows = params.num_tokens * params.num_heads,
            .num_states = static_cast<int>(params.num_states),
            .head_dim = params.head_dim};
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
  std::optional<Scratch> listed;
  if (args.num_states > kLaunchStates) {
    listed.emplace(args.num_states * sizeof(Partial), stream);
    args.listed = reinterpret_cast<const Partial*>(listed->data());
    list_all(params, reinterpret_cast<Partial*>(listed->data()), stream);
  } else {
    copy_states(params, 0, args.num_states, args.states);
  }
  launch("merge_states", kernel,
         dim3(static_cast<unsigned>(ceil_div(args.num_rows, kThreads / 32))), kThreads, 0, stream,
         args);
}

}  // namespace kvlink::cuda
