#include "kvlink/base/check.hpp"
#include "kvlink/base/convert.hpp"
#include "kvlink/base/math.hpp"
#include "kvlink/cuda/apply_rope.hpp"
#include "kvlink/cuda/error_record.cuh"
#include "kvlink/cuda/launch.cuh"

namespace kvlink::cuda {

namespace {

constexpr int kThreads = 256;

struct Args {
  ApplyRopeParams params;
  ErrorRecord* errors;
};

// Grid: a warp for each row, one head of one token. out may be x: a pair, and a dim that does not
// turn, is one lane's.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) turn_rows(const __grid_constant__ Args args) {
  using Type = typename Storage<kDType>::Type;
  const ApplyRopeParams& p = args.params;
  const RopeParams& rope = p.rope;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= p.num_tokens * p.num_heads) return;
  const int64_t token = row / p.num_heads, head = row % p.num_heads;
  const int64_t position = rope.positions[token];
  if (position < 0 || position >= rope.num_positions) {
    if (lane == 0) record_error(args.errors, BadEntry::kRopePositions, token, position);
    return;
  }
  const Type* const x =
      static_cast<const Type*>(p.x) + token * p.x_stride_token + head * p.x_stride_head;
  Type* const out =
      static_cast<Type*>(p.out) + token * p.out_stride_token + head * p.out_stride_head;
  const float* const cosines = rope.cos_sin + position * rope.stride_position;
  const int half = rope.rotary_dim / 2;
  for (int pair = lane; pair < half; pair += 32) {
    const int first = rope.first_dim + (rope.interleaved ? 2 * pair : pair);
    const int second = first + (rope.interleaved ? 1 : half);
    const float a = Storage<kDType>::load(x[first]), b = Storage<kDType>::load(x[second]);
    const float cosine = cosines[pair], sine = cosines[half + pair];
    out[first] = Storage<kDType>::store(__fadd_rn(__fmul_rn(a, cosine), -__fmul_rn(b, sine)));
    out[second] = Storage<kDType>::store(__fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine)));
  }
  if (x == out) return;
  for (int i = lane; i < p.head_dim - rope.rotary_dim; i += 32) {
    const int dim = i < rope.first_dim ? i : i + rope.rotary_dim;
    out[dim] = x[dim];
  }
}

}  // namespace

void apply_rope(const ApplyRopeParams& params, cudaStream_t stream) {
  check_rope_dims(params.rope, params.head_dim);
  report_errors();
  const int64_t num_rows = params.num_tokens * params.num_heads;
  if (num_rows == 0) return;
  const Args args{.params = params, .errors = error_record()};
  const auto kernel = params.dtype == DType::kFloat32   ? turn_rows<DType::kFloat32>
                      : params.dtype == DType::kFloat16 ? turn_rows<DType::kFloat16>
                                                        : turn_rows<DType::kBFloat16>;
  const dim3 grid(static_cast<unsigned>(ceil_div(num_rows, int64_t{kThreads / 32})));
  launch("apply_rope", kernel, grid, kThreads, 0, stream, args);
}

}  // namespace kvlink::cuda
